"""Figures of tool calls."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from meshkit.telemetry import begin_at_zero

_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)

CALLS = Counter("hermesh_tool_calls", "Tool calls ended, by outcome.", ["tool", "outcome"])
SECONDS = Histogram(
    "hermesh_tool_seconds", "Time from the journal's go to the outcome.", ["tool"], buckets=_BUCKETS
)
RUNNING = Gauge("hermesh_tool_running", "Tool calls being worked on now.")
REFUSED = Counter("hermesh_tool_refused", "Calls refused because the replica was at its limit.")
STORING = Gauge(
    "hermesh_tool_results_storing", "Large results on their way to the object store, waiting ones too."
)
CUT = begin_at_zero(
    Counter("hermesh_tool_results_cut", "Large results of which only the beginning was kept.", ["reason"]),
    *("store_down", "no_store", "stopped", "error"),
)
DELETED = Counter("hermesh_tool_results_deleted", "Large results of deleted sessions that were deleted.")
DELETED_BYTES = Counter("hermesh_tool_results_deleted_bytes", "The bytes of these.")
COMPLETE_RETRIES = Counter("hermesh_tool_complete_retries", "Outcomes that had to be recorded again.")
RECONCILES = Counter(
    "hermesh_tool_reconciles", "Looks at what became of an unknown call, by finding.", ["tool", "finding"]
)
