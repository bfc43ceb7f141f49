-- The tool journal.

-- name: begin
-- See session.begin_tool_call.
-- $1 call_id, $2 session_id, $3 fence, $4 how long it may act
SELECT b.outcome, (b.call).*, session.quiet_in_ms((b.call).quiet_at) AS quiet_in_ms,
       CASE WHEN b.outcome <> 1 THEN session.confirm() END
FROM session.begin_tool_call($1, $2, $3, $4) b;

-- name: complete
-- See session.end_try.
-- $1 call_id, $2 fence, $3 state, $4 content, $5 content_ref, $6 tries, $7 whether it still acts
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms, session.confirm()
FROM session.end_try($1, $2, $3, $4, $5, $6, $7) c;

-- name: reconcile
-- See session.settle_tool_call.
-- $1 call_id, $2 state, $3 content, $4 content_ref, $5 tries
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms, session.confirm()
FROM session.settle_tool_call($1, $2, $3, $4, $5) c;

-- name: look
-- One call of a session, for the mesh.
-- $1 call_id, $2 session_id
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms
FROM session.tool_call c WHERE c.call_id = $1 AND c.session_id = $2;

-- name: waiting_calls
-- A run's calls that wait for a person, in order: of one step, so that their number is bounded.
-- $1 tenant_id, $2 run_id
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms
FROM session.tool_call c
WHERE c.run_id = $2 AND c.tenant_id = $1 AND session.call_waits(c.state, c.needs_approval)
ORDER BY c.position;

-- name: resolve
-- See session.resolve_action.
-- $1 tenant_id, $2 run_id, $3 call_id, $4 decision, $5 content, $6 request_id, $7 fingerprint, $8 time_ms, $9 data
SELECT (r.run).*, session.confirm() FROM session.resolve_action($1, $2, $3, $4, $5, $6, $7, $8, $9) r;

-- name: get_call
-- One call of a run.
-- $1 tenant_id, $2 run_id, $3 call_id
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms
FROM session.tool_call c WHERE c.call_id = $3 AND c.run_id = $2 AND c.tenant_id = $1;

-- name: pending
-- A tenant's calls that runs wait for, the oldest run first, after a position. The last event of a run that
-- waits is what made it wait, or what came of another of its calls. Of those past so many bytes only the place comes.
-- $1 tenant_id, $2 run_id and $3 position of the last one seen, $4 how many, $5 how many bytes
WITH page AS (
    SELECT c.call_id, r.run_id, c.position, coalesce(e.time_ms, r.created_ms) AS since_ms,
           octet_length(c.content) + octet_length(c.arguments) AS size
    FROM session.run r
    JOIN session.tool_call c ON c.run_id = r.run_id AND session.call_waits(c.state, c.needs_approval)
    LEFT JOIN session.event e ON e.run_id = r.run_id AND e.seq = r.last_seq
    WHERE r.tenant_id = $1 AND r.status = 3 AND (r.run_id, c.position) > ($2::uuid, $3::integer)
      AND r.run_id >= $2
    ORDER BY r.run_id, c.position
    LIMIT $4
), sized AS (
    SELECT *, sum(size) OVER (ORDER BY run_id, position) - size < $5::bigint AS fits FROM page
)
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms, s.since_ms, s.fits
FROM sized s
LEFT JOIN session.tool_call c ON c.call_id = s.call_id AND s.fits
ORDER BY s.run_id, s.position;
