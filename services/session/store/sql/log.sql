-- The log and its leases. Statements over several leases lock them in the order of their session ids first, and
-- skip those that somebody else has locked: one row that is held for long must cost nobody but its own run.
-- An owner is a process: what it is granted under any fence, or was by a statement whose answer nobody heard, is
-- its own until somebody else takes it.

-- name: append
-- Writes plain appends of many runs at once. An append is won if session, run, fence and next seq match and
-- the lease is held; returned are the places of those that won. An event keeps the fence that its writer
-- named, so that the log itself shows who wrote it. A lease that somebody has locked is skipped: session.refusal
-- tells it from one that is lost.
-- $1 session_id[], $2 run_id[], $3 fence[], $4 first_seq[], $5 n[], one of each an append, sessions distinct;
-- $6 place of the append[], $7 seq[], $8 type[], $9 time_ms[], $10 data[], one of each an event
WITH b AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::integer[], $5::integer[])
    WITH ORDINALITY t(session_id, run_id, fence, first_seq, n, i)
), held AS MATERIALIZED (
    SELECT session_id FROM session.lease WHERE session_id = ANY($1::uuid[])
    ORDER BY session_id FOR NO KEY UPDATE SKIP LOCKED
), won AS (
    UPDATE session.lease l SET next_seq = l.next_seq + b.n
    FROM b JOIN held USING (session_id)
    WHERE l.session_id = b.session_id AND l.run_id = b.run_id AND l.fence = b.fence
      AND l.next_seq = b.first_seq AND l.owner IS NOT NULL
    RETURNING b.i, l.run_id, l.session_id, l.tenant_id, b.fence
), ins AS (
    INSERT INTO session.event (run_id, seq, time_ms, tenant_id, session_id, fence, type, data)
    SELECT w.run_id, c.seq, c.time_ms, w.tenant_id, w.session_id, w.fence, c.type, c.data
    FROM unnest($6::bigint[], $7::integer[], $8::text[], $9::bigint[], $10::text[]) c(i, seq, type, time_ms, data)
    JOIN won w USING (i)
)
SELECT i FROM won;

-- name: refusals
-- Why appends were refused, by session.refusal, in the order of the arrays. A gap may mean that the append was
-- committed before.
-- $1 session_id[], $2 run_id[], $3 fence[], $4 first_seq[], $5 n[]
SELECT r.outcome, r.next_seq, CASE WHEN r.outcome = 3 THEN session.confirm() END
FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::integer[], $5::integer[])
     WITH ORDINALITY b(session_id, run_id, fence, first_seq, n, i),
     LATERAL session.refusal(b.session_id, b.run_id, b.fence, b.first_seq, b.n) r
ORDER BY b.i;

-- name: append_step
-- See session.append_step.
SELECT outcome, next_seq, CASE WHEN outcome = 3 THEN session.confirm() END
FROM session.append_step($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14);

-- name: reattach
-- Renews a lease under a new fence. The owner may name any fence up to the current one: what came since was
-- granted to itself, by a statement whose answer got lost. Under another owner's name only the current fence will do.
-- $1 session_id, $2 run_id, $3 fence, $4 owner, $5 TTL
UPDATE session.lease
SET fence = fence + 1, attach = attach + 1, owner = $4, lease_until = clock_timestamp() + $5::interval
WHERE session_id = $1 AND run_id = $2 AND owner IS NOT NULL
  AND (fence = $3 OR owner = $4 AND fence > $3)
RETURNING fence, attach, next_seq;

-- name: renew
-- Extends leases, by their fence or an earlier one of the same owner. Returns the runs whose lease was extended, and
-- which of them are to be cancelled. Those that somebody has locked are not among them.
-- $1 session_id[], $2 run_id[], $3 fence[], $4 TTL, $5 owner
WITH b AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) t(session_id, run_id, fence)
), held AS MATERIALIZED (
    SELECT session_id FROM session.lease WHERE session_id = ANY($1::uuid[])
    ORDER BY session_id FOR NO KEY UPDATE SKIP LOCKED
), kept AS (
    UPDATE session.lease l SET lease_until = clock_timestamp() + $4::interval
    FROM b JOIN held USING (session_id)
    WHERE l.session_id = b.session_id AND l.run_id = b.run_id AND l.owner IS NOT NULL
      AND (l.fence = b.fence OR l.owner = $5 AND l.fence > b.fence)
    RETURNING l.run_id
)
SELECT k.run_id, r.cancel_requested FROM kept k JOIN session.run r USING (run_id);

-- name: release
-- Frees a lease, by its fence or an earlier one of the same owner; its run is due at once, and the claim does not
-- count as one that moved nothing.
-- $1 session_id, $2 run_id, $3 fence, $4 owner
WITH freed AS (
    UPDATE session.lease SET owner = NULL, lease_until = NULL
    WHERE session_id = $1 AND run_id = $2 AND owner IS NOT NULL AND (fence = $3 OR owner = $4 AND fence > $3)
    RETURNING session_id, run_id
), due AS (
    UPDATE session.run r SET dispatch_after = clock_timestamp(), idle_claims = greatest(r.idle_claims - 1, 0)
    FROM freed WHERE r.run_id = freed.run_id AND r.status = 2
    RETURNING r.session_id
)
SELECT freed.session_id, pg_notify('hermesh_due', due.session_id::text)
FROM freed LEFT JOIN due USING (session_id);

-- name: shorten
-- Cuts leases where fence and attach still match; returns them. Those that somebody has locked are not among them.
-- $1 session_id[], $2 run_id[], $3 fence[], $4 attach[], $5 how long they shall last
WITH b AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::integer[]) t(session_id, run_id, fence, attach)
), held AS MATERIALIZED (
    SELECT session_id FROM session.lease WHERE session_id = ANY($1::uuid[])
    ORDER BY session_id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE session.lease l SET lease_until = least(l.lease_until, clock_timestamp() + $5::interval)
FROM b JOIN held USING (session_id)
WHERE l.session_id = b.session_id AND l.run_id = b.run_id AND l.fence = b.fence AND l.attach = b.attach
  AND l.owner IS NOT NULL
RETURNING l.run_id;

-- name: shorten_claims
-- Cuts the leases that a process took and wrote nothing under, of which no append stream tells. What it took only
-- since is left alone: it knows of that. Returns each, and whether it was cut or is locked by somebody.
-- $1 owner, $2 how long they shall last, $3 how long ago they were taken at least
WITH found AS MATERIALIZED (
    SELECT l.session_id, l.fence
    FROM session.run r
    JOIN session.lease l USING (session_id)
    WHERE r.status = 2 AND l.run_id = r.run_id AND l.owner = $1
      AND l.attach = 0 AND l.next_seq = r.claim_seq AND r.dispatch_after <= clock_timestamp() - $3::interval
), held AS MATERIALIZED (
    SELECT l.session_id FROM session.lease l WHERE l.session_id IN (SELECT session_id FROM found)
    ORDER BY session_id FOR NO KEY UPDATE SKIP LOCKED
), cut AS (
    UPDATE session.lease l SET lease_until = least(l.lease_until, clock_timestamp() + $2::interval)
    FROM held JOIN found USING (session_id)
    WHERE l.session_id = held.session_id AND l.owner = $1 AND l.fence = found.fence
    RETURNING l.session_id
)
SELECT f.session_id, c.session_id IS NOT NULL AS cut
FROM found f LEFT JOIN held h USING (session_id) LEFT JOIN cut c USING (session_id)
WHERE c.session_id IS NOT NULL OR h.session_id IS NULL;

-- name: end_former
-- Ends the leases of a process's predecessors, those that had its name: an owner is its process's name, a tilde, and eight
-- characters that no other process has. Returns each, and whether it was ended or is locked by somebody.
-- $1 owner
WITH found AS MATERIALIZED (
    SELECT l.session_id
    FROM session.run r
    JOIN session.lease l USING (session_id)
    WHERE r.status = 2 AND l.run_id = r.run_id AND left(l.owner, -8) = left($1, -8) AND l.owner <> $1
      AND l.lease_until > clock_timestamp()
), held AS MATERIALIZED (
    SELECT l.session_id FROM session.lease l WHERE l.session_id IN (SELECT session_id FROM found)
    ORDER BY session_id FOR NO KEY UPDATE SKIP LOCKED
), cut AS (
    UPDATE session.lease l SET lease_until = clock_timestamp()
    FROM held
    WHERE l.session_id = held.session_id AND left(l.owner, -8) = left($1, -8) AND l.owner <> $1
    RETURNING l.session_id
)
SELECT f.session_id, c.session_id IS NOT NULL AS cut
FROM found f LEFT JOIN held h USING (session_id) LEFT JOIN cut c USING (session_id)
WHERE c.session_id IS NOT NULL OR h.session_id IS NULL;

-- name: leases_of
-- The leases that a process has.
-- $1 owner
SELECT l.session_id, l.run_id, l.fence, l.attach
FROM session.run r
JOIN session.lease l USING (session_id)
WHERE r.status = 2 AND l.run_id = r.run_id AND l.owner = $1;

-- name: lost_leases
-- Which of some grants are good no more: their run ended or waits, or was released or taken under another fence.
-- What an owner was granted since it knows of is no loss.
-- $1 session_id[], $2 run_id[], $3 fence[], $4 owner or nothing
SELECT b.run_id
FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) b(session_id, run_id, fence)
WHERE NOT EXISTS (SELECT FROM session.lease l WHERE l.session_id = b.session_id AND l.run_id = b.run_id
                  AND l.owner IS NOT NULL AND (l.fence = b.fence OR l.owner = $4 AND l.fence > b.fence));

-- name: fences
-- The current fences.
-- $1 session_ids
SELECT session_id, fence FROM session.lease WHERE session_id = ANY($1::uuid[]);

-- name: events_after
-- A run's events past a seq, in order: until they are so many, or have so many bytes.
-- $1 tenant_id, $2 run_id, $3 seq, $4 how many, $5 how many bytes
SELECT seq, type, time_ms, data FROM (
    SELECT *, sum(octet_length(data)) OVER (ORDER BY seq) - octet_length(data) AS bytes FROM (
        SELECT seq, type, time_ms, data FROM session.event
        WHERE run_id = $2 AND tenant_id = $1 AND seq > $3
        ORDER BY seq
        LIMIT $4
    ) e
) p
WHERE bytes < $5
ORDER BY seq;

-- name: heads
-- The last seq of each run's log.
-- $1 run_ids
SELECT run_id, last_seq FROM session.run_view WHERE run_id = ANY($1::uuid[]);
