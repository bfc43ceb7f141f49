-- What somebody who is no part of the mesh does to its database.

-- name: lock_leases
-- Locks leases that somebody holds, of sessions that nobody knows beforehand.
-- $1 how many
SELECT session_id FROM session.lease WHERE owner IS NOT NULL LIMIT $1 FOR UPDATE SKIP LOCKED;

-- name: lock_runs
-- Locks runs that are under way or wait for their turn.
-- $1 how many
SELECT run_id FROM session.run WHERE status IN (1, 2) LIMIT $1 FOR UPDATE SKIP LOCKED;

-- name: terminate_others
-- Ends every client's backend but one's own and some others.
-- $1 process ids to spare
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND pid <> ALL ($1::integer[]);
