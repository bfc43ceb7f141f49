"""Distributions of times as HDR histograms: three significant digits from a microsecond to ten minutes."""

from __future__ import annotations

from collections.abc import Iterable

from hdrh.histogram import HdrHistogram

HIGHEST_US = 600_000_000
DIGITS = 3


class Times:
    """Times in nanoseconds, kept in microseconds; what is below zero counts as zero."""

    def __init__(self, nanoseconds: Iterable[int] = ()) -> None:
        self._histogram = HdrHistogram(1, HIGHEST_US, DIGITS)
        self.add(nanoseconds)

    def add(self, nanoseconds: Iterable[int]) -> None:
        """Adds times; what is longer than ten minutes counts as ten minutes."""
        for one in nanoseconds:
            self._histogram.record_value(min(max(one, 0) // 1000, HIGHEST_US))

    @classmethod
    def decode(cls, text: str) -> Times:
        """Reads what `encode` wrote."""
        times = cls()
        times._histogram.decode_and_add(text)
        return times

    def encode(self) -> str:
        """Returns it in HdrHistogram's own compressed form, as base64 text."""
        return str(self._histogram.encode().decode())

    def merge(self, other: Times) -> None:
        """Adds all times of another."""
        self._histogram.add(other._histogram)

    @property
    def count(self) -> int:
        """How many times it has."""
        return int(self._histogram.get_total_count())

    def ms(self, percentile: float) -> float:
        """The time at a percentile in milliseconds; 0 when there is none."""
        return float(self._histogram.get_value_at_percentile(percentile)) / 1000 if self.count else 0.0
