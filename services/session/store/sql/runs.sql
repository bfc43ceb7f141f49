-- Runs.

-- name: submit
-- See session.submit_run.
SELECT s.duplicate, s.created_ms AS event_time_ms, s.created_data, s.outcome, s.fence, s.attach, s.next_seq,
       s.context, (s.run).*, CASE WHEN s.duplicate THEN session.confirm() END
FROM session.submit_run($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
                        $20, $21) s;

-- name: claim
-- See session.claim_run.
-- $1 run_id, $2 owner, $3 TTL, $4 most claims without progress, $5 most messages of the history, $6 most bytes of
-- them, $7 most bytes of what the run itself stored
SELECT c.outcome, c.fence, c.attach, c.next_seq, c.context, (c.run).*
FROM session.claim_run($1, $2, $3, $4, $5, $6, $7) c;

-- name: read_context
-- A page of what a run stored, for its holder; no row under a fence that is not of this claim. See
-- session.context_page.
-- $1 run_id, $2 fence, $3 ordinal, $4 position, $5 seq, $6 most bytes
SELECT r.session_id, p.*
FROM session.run r
JOIN session.lease l USING (session_id)
CROSS JOIN LATERAL session.context_page(r.run_id, $3, $4, $5, $6) p
WHERE r.run_id = $1 AND l.run_id = r.run_id AND l.owner IS NOT NULL
  AND $2::bigint BETWEEN l.fence - l.attach AND l.fence;

-- name: get_run
-- One run of a tenant.
-- $1 tenant_id, $2 run_id
SELECT * FROM session.run_view WHERE run_id = $2 AND tenant_id = $1;

-- name: accepted
-- Whether input with an idempotency key was accepted.
-- $1 tenant_id, $2 key
SELECT EXISTS (
    SELECT 1 FROM session.idempotency WHERE tenant_id = $1 AND scope = 'run' AND key = $2
) AS accepted;

-- name: list_runs
-- A session's runs, newest first, before an ordinal.
-- $1 tenant_id, $2 session_id, $3 ordinal, $4 how many
SELECT * FROM session.run_view
WHERE session_id = $2 AND tenant_id = $1 AND ordinal < $3
ORDER BY ordinal DESC
LIMIT $4;

-- name: runs_from
-- A session's runs in order, from an ordinal on.
-- $1 tenant_id, $2 session_id, $3 ordinal, $4 how many
SELECT * FROM session.run_view
WHERE session_id = $2 AND tenant_id = $1 AND ordinal >= $3
ORDER BY ordinal
LIMIT $4;

-- name: cancel
-- See session.cancel_run.
-- $1 tenant_id, $2 run_id, $3 reason
SELECT c.event_seq, c.event_time_ms, c.event_data, (c.run).*, session.confirm()
FROM session.cancel_run($1, $2, $3) c;

-- name: fail_held
-- See session.fail_held. That the claim is over is no row, so that nothing here could confirm it: its locks on the
-- lease and the run are in the log, and their commit waits for a synchronous standby.
-- $1 session_id, $2 run_id, $3 fence, $4 what a person reads
SELECT * FROM session.fail_held($1, $2, $3, $4);

-- name: due
-- Takes runs to dispatch: next in their session, and nobody holds them. They are due again after $2.
-- Each tenant's oldest first, then each one's second oldest, and so on: a flood of one makes no other wait.
-- now() and not clock_timestamp() where an index shall serve. What is due only much later was put off by a clock
-- that has gone back since. After a statement of this kind whose answer nobody heard, what it took is taken again:
-- whom two dispatch, one claims.
-- $1 how many, $2 interval, $3 how far ahead of their time they are taken
WITH RECURSIVE owners AS (
    -- By the index from one tenant to the next: it costs the tenants that have runs, and not all their runs.
    (SELECT r.tenant_id FROM session.run r WHERE r.status IN (1, 2) AND r.dispatch_after IS NOT NULL
     ORDER BY r.tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.tenant_id FROM session.run r
            WHERE r.status IN (1, 2) AND r.dispatch_after IS NOT NULL AND r.tenant_id > t.tenant_id
            ORDER BY r.tenant_id LIMIT 1)
    FROM owners t WHERE t.tenant_id IS NOT NULL
), waiting AS (
    SELECT w.run_id, w.dispatch_after,
           row_number() OVER (PARTITION BY t.tenant_id ORDER BY w.dispatch_after) AS place
    FROM (SELECT * FROM owners
          WHERE tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM session.tenant_move m))) t
    CROSS JOIN LATERAL (
        SELECT r.run_id, r.dispatch_after
        FROM session.run r
        JOIN session.lease l USING (session_id)
        WHERE r.tenant_id = t.tenant_id AND r.status IN (1, 2)
          AND (r.dispatch_after <= now() + $3::interval OR r.dispatch_after > now() + interval '1 minute')
          AND (l.owner IS NULL OR NOT session.in_force(l.lease_until))
        ORDER BY r.dispatch_after
        LIMIT $1
    ) w
), due AS (
    -- The conditions again, for a row that another replica has taken meanwhile.
    SELECT r.run_id
    FROM session.run r
    WHERE r.run_id = ANY (ARRAY(SELECT w.run_id FROM waiting w ORDER BY w.place, w.dispatch_after LIMIT $1))
      AND r.status IN (1, 2)
      AND (r.dispatch_after <= now() + $3::interval OR r.dispatch_after > now() + interval '1 minute')
    FOR NO KEY UPDATE OF r SKIP LOCKED
)
UPDATE session.run r SET dispatch_after = clock_timestamp() + $2::interval
FROM due WHERE r.run_id = due.run_id
RETURNING r.run_id;

-- name: queued
-- How many runs of each tenant wait, for an agent or for another run of their session. There are no more rows
-- than there is room for: SubmitRun refuses what is beyond. Those of a tenant on its way elsewhere wait for nobody here.
SELECT tenant_id, count(*) AS runs FROM session.run
WHERE status = 1 AND tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM session.tenant_move m))
GROUP BY tenant_id;

-- name: end_orphans
-- See session.end_orphans.
-- $1 how many at most
SELECT session.end_orphans($1);

-- name: last_ordinals
-- The ordinal of each session's newest run.
-- $1 session_ids
SELECT session_id, run_count FROM session.session WHERE session_id = ANY($1::uuid[]);
