"""What an agent counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from meshkit.telemetry import begin_at_zero
from services.agent.domain.loop import CallState

# The name that autoscalers in this project's deployments look at.
active_runs = Gauge("hermes_active_sessions", "Sessions whose run this replica works on now")
run_limit = Gauge(
    "hermesh_agent_run_limit", "Most runs that this replica works on at once, as it bears them now"
)
refused_runs = Counter(
    "hermesh_agent_refused_runs_total", "Runs refused for lack of a place: new ones, queued ones", ["kind"]
)
unheard_leases = Counter(
    "hermesh_agent_unheard_leases_total", "Leases given up that were granted by calls whose answer never came"
)
runs_ended = begin_at_zero(
    Counter("hermesh_agent_runs_total", "Runs that ended on this replica", ["outcome"]),
    *("completed", "failed", "cancelled", "requires_action", "released", "lost"),
)
takeovers = Counter("hermesh_agent_takeovers_total", "Claims of a run that another attempt had begun")
first_token = Histogram(
    "hermesh_agent_first_token_seconds",
    "From the claim of a run to its first token",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
model_requests = begin_at_zero(
    Counter(
        "hermesh_agent_model_requests_total",
        "Requests sent to model backends: a turn's first, and those that a failure or a takeover made needed",
        ["kind"],
    ),
    *("first", "again"),
)
model_errors = Counter("hermesh_agent_model_errors_total", "Model turns that failed", ["reason"])
backend_errors = Counter(
    "hermesh_agent_model_backend_errors_total",
    "Requests that a model backend failed; before the first token another one may have served them.",
    ["backend", "reason"],
)
tool_calls = begin_at_zero(
    Counter("hermesh_agent_tool_calls_total", "Tool calls by their outcome", ["state"]),
    *(state.value for state in CallState),
)
unreached_calls = Counter(
    "hermesh_agent_unreached_tool_calls_total",
    "Tool calls that no tool service answered for, settled by the journal's word",
)
degraded_contexts = Counter(
    "hermesh_agent_degraded_contexts_total", "Runs that went on without a part of their context", ["part"]
)
unwritten_ends = Counter(
    "hermesh_agent_unwritten_ends_total",
    "Runs that could not write their end, by whether the store ended them",
    ["ended"],
)
unkept_exchanges = Counter(
    "hermesh_agent_unkept_exchanges_total", "Exchanges that the memory service did not keep"
)
