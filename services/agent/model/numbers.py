"""Numbers that a model server sends: none is trusted to fit where it is going.

A count of tokens ends in an int32 of the wire and of the database, summed over a run's turns. What is read
here fits there, and so does every sum of it: a reply is never lost to a number that nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.agent.model.port import MAX_COUNT, Usage


def whole(value: object, most: int = MAX_COUNT) -> int:
    """Return what a backend gave as a whole number, from 0 to `most`.

    Args:
        value: anything that JSON can hold. A number may come as text; its fraction is dropped; what is no
            number, or is below 0, counts as 0, and what is above `most` as `most`.
        most: the largest that fits.
    """
    if isinstance(value, str):
        value = _number(value)
    # NaN differs from itself; `math.isnan` fails for a whole number that no double holds.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return 0
    if value >= most:
        return most
    return int(value) if value > 0 else 0


def _number(text: str) -> float:
    # As a float, however many digits there are: an int of so many takes time that grows with their square.
    try:
        return float(text[:400])
    except ValueError:
        return 0.0


def usage_of(usage: object) -> Usage:
    """Read a usage object; counts that are absent or no numbers are 0, and one that is no object has none."""
    if not isinstance(usage, Mapping):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    return Usage(whole(usage.get("prompt_tokens")), whole(usage.get("completion_tokens")), whole(cached))
