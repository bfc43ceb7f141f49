-- The tool journal.

-- name: begin
-- See session.begin_tool_call.
-- $1 call_id, $2 session_id, $3 fence
SELECT b.outcome, (b.call).* FROM session.begin_tool_call($1, $2, $3) b;

-- name: complete
-- See session.complete_tool_call.
-- $1 call_id, $2 fence, $3 state, $4 content, $5 content_ref
SELECT * FROM session.complete_tool_call($1, $2, $3, $4, $5);

-- name: reconcile
-- See session.settle_tool_call.
-- $1 call_id, $2 state, $3 content, $4 content_ref
SELECT * FROM session.settle_tool_call($1, $2, $3, $4);

-- name: calls_of_run
-- A run's calls in order.
-- $1 tenant_id, $2 run_id
SELECT * FROM session.tool_call WHERE run_id = $2 AND tenant_id = $1 ORDER BY position;

-- name: resolve
-- See session.resolve_action.
-- $1 tenant_id, $2 run_id, $3 call_id, $4 decision, $5 content, $6 type[], $7 time_ms[], $8 data[]
SELECT (r.run).* FROM session.resolve_action($1, $2, $3, $4, $5, $6, $7, $8) r;

-- name: get_call
-- One call of a run.
-- $1 tenant_id, $2 run_id, $3 call_id
SELECT * FROM session.tool_call WHERE call_id = $3 AND run_id = $2 AND tenant_id = $1;
