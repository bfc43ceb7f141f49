"""The figures that tables show: names in the results, labels, units. And ratios to the model alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is shown."""

    name: str
    label: str
    unit: str
    digits: int


SHOWN = (
    Figure("ttft_p50_ms", "first token, p50", "ms", 1),
    Figure("ttft_p90_ms", "first token, p90", "ms", 1),
    Figure("ttft_p99_ms", "first token, p99", "ms", 1),
    Figure("ttft_added_ms", "first token, p50, added to the model's", "ms", 1),
    Figure("tokens_per_second", "tokens a second", "", 0),
    Figure("tokens_ratio", "tokens a second, share of the model's", "", 3),
    Figure("replies_per_second", "replies a second", "", 1),
    Figure("reply_p50_ms", "whole reply, p50", "ms", 1),
    Figure("reply_p99_ms", "whole reply, p99", "ms", 1),
    Figure("gap_p50_ms", "between tokens, p50", "ms", 2),
    Figure("gap_p99_ms", "between tokens, p99", "ms", 2),
    Figure("gap_max_ms", "between tokens, longest", "ms", 1),
    Figure("added_p50_ms", "later than the model's schedule, p50", "ms", 1),
    Figure("added_p99_ms", "later than the model's schedule, p99", "ms", 1),
    Figure("added_max_ms", "later than the model's schedule, most", "ms", 1),
    Figure("behind", "streams that fell behind", "", 0),
    Figure("alone_p50_ms", "first token of the polite clients alone, p50", "ms", 1),
    Figure("alone_p99_ms", "first token of the polite clients alone, p99", "ms", 1),
    Figure("beside_p50_ms", "first token of the polite clients beside the flood, p50", "ms", 1),
    Figure("beside_p99_ms", "first token of the polite clients beside the flood, p99", "ms", 1),
    Figure("flood_p50_ms", "first token of the flood, p50", "ms", 1),
    Figure("flood_p99_ms", "first token of the flood, p99", "ms", 1),
    Figure("polite_replies", "replies of the polite clients beside the flood, all whole", "", 0),
    Figure("flood_replies", "replies of the flood meanwhile, all whole", "", 0),
    Figure("recalled", "memories recalled, a reply", "", 1),
    Figure("short_p50_ms", "first token in a short session, p50", "ms", 1),
    Figure("long_p50_ms", "first token in a long session, p50", "ms", 1),
    Figure("short_first_ms", "first turn of a short session after it was filled", "ms", 1),
    Figure("long_first_ms", "first turn of a long session after it was filled", "ms", 1),
    Figure("ttft_ratio", "long to short, p50", "times", 2),
    Figure("gateway_kib_each", "gateway's memory for each watcher", "KiB", 1),
    Figure("session_kib_each", "sessions' memory for each watcher", "KiB", 1),
    Figure("envoy_kib_each", "Envoy's memory for each watcher", "KiB", 1),
    Figure("gateway_percent", "gateway while idle", "% of a core", 2),
    Figure("session_percent", "sessions while idle", "% of a core", 2),
    Figure("envoy_percent", "Envoy while idle", "% of a core", 2),
    Figure("mesh_percent", "the whole mesh while idle, stores included", "% of a core", 2),
    Figure("event_p50_ms", "next event, p50", "ms", 1),
    Figure("event_p99_ms", "next event, p99", "ms", 1),
    Figure("event_max_ms", "next event, the slowest", "ms", 1),
    Figure("cpu_per_1000", "CPU without stores", "s / 1,000 tokens", 4),
    Figure("cpu_with_stores_per_1000", "CPU with stores", "s / 1,000 tokens", 4),
    Figure("cpu_ms_per_reply", "CPU of a whole reply with stores", "ms", 1),
    Figure("generator_cpu_per_1000", "CPU of the load generator (not counted)", "s / 1,000 tokens", 4),
    Figure("others_cores", "cores that others on the machine used", "", 2),
)


def number(value: float, digits: int) -> str:
    """Returns a number as tables show it."""
    return f"{value:,.{digits}f}"
