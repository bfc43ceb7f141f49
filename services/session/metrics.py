"""What a session replica counts; served on /metrics."""

from prometheus_client import Counter, Gauge, Histogram

from meshkit.telemetry import begin_at_zero

append_streams = Gauge("hermesh_session_append_streams", "Open Append streams.")
attached_runs = Gauge("hermesh_session_attached_runs", "Runs whose writer appends on this replica.")
flush_appends = Histogram(
    "hermesh_session_flush_appends",
    "Appends in one group commit.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
flush_seconds = Histogram(
    "hermesh_session_flush_seconds",
    "Duration of one group commit.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
)
step_seconds = Histogram(
    "hermesh_session_step_commit_seconds",
    "Duration of one step commit.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
)
appends = Counter("hermesh_session_appends_total", "Appends by what became of them.", ["outcome"])
locked_appends = Counter(
    "hermesh_session_locked_appends_total", "Times an append was put off because its lease was locked."
)
events = Counter("hermesh_session_events_total", "Events committed on this replica.")
watchers = Gauge("hermesh_session_watchers", "Open watches.", ["kind"])
watch_catch_up = Counter(
    "hermesh_session_watch_catch_up_total", "Times a watcher went back to PostgreSQL.", ["cause"]
)
cached_contexts = Counter(
    "hermesh_session_cached_contexts_total",
    "Contexts whose history the cache had (hit) or not (miss).",
    ["result"],
)
refusals = begin_at_zero(
    Counter(
        "hermesh_session_database_refusals_total",
        "Statements that PostgreSQL refused for want of room, memory or connections, by SQLSTATE.",
        ["sqlstate"],
    ),
    # No room, no memory, no connection, read-only.
    *("53100", "53200", "53300", "25006"),
)
standby_lag = Gauge(
    "hermesh_session_standby_lag_seconds", "By how much the standby for reads may be behind the primary."
)
standby_reads = Counter(
    "hermesh_session_standby_reads_total",
    "Pages of old events looked for on a standby: read, not_there, or failed; the last two ask the primary.",
    ["result"],
)
publishes = Counter("hermesh_session_publishes_total", "Appends offered to Redis by reply.", ["reply"])
redis_failures = Counter(
    "hermesh_session_redis_failures_total", "Calls of Redis that failed, by what was wrong.", ["cause"]
)
tail_degraded = Gauge(
    "hermesh_session_tail_degraded",
    "1 while what other replicas commit is looked up in PostgreSQL, since Redis does not bring it.",
)
queued_runs = Gauge("hermesh_session_queued_runs", "Runs that wait in the whole mesh, as last counted.")
refused_input = Counter("hermesh_session_refused_input_total", "Input refused because too many runs wait.")
dispatches = Counter("hermesh_session_dispatches_total", "Runs dispatched to agents by result.", ["result"])
dispatched_runs = Gauge("hermesh_session_dispatched_runs", "Runs whose Execute stream this replica holds.")
ended_orphans = Counter(
    "hermesh_session_ended_orphans_total", "Cancelled or late runs that were ended because nobody held them."
)
leases_shortened = Counter("hermesh_session_leases_shortened_total", "Leases cut after a stream broke.")
gone_sessions = Gauge(
    "hermesh_session_gone_sessions",
    "Deleted sessions that may still have large results in the object store, counted up to 10,000.",
)
collections = Counter(
    "hermesh_session_collections_total",
    "Times the results of a deleted session were deleted, by what came of it: done, more, failed.",
    ["result"],
)
