-- Upkeep; safe to run on several replicas at once.

-- name: maintain_partitions
-- See session.maintain_partitions.
-- $1 days ahead, $2 retention
SELECT made, dropped FROM session.maintain_partitions($1, $2);

-- name: set_lock_timeout
-- Upkeep waits for locks less than others do: whoever comes after it waits in the same line.
SELECT set_config('lock_timeout', '500ms', true);

-- name: set_long_statement
-- For a transaction that may touch many rows.
SELECT set_config('statement_timeout', '55s', true);

-- name: expire_requests
-- Forgets old request ids, a bounded number at once.
-- $1 interval, $2 how many
DELETE FROM session.idempotency
WHERE ctid = ANY(ARRAY(SELECT ctid FROM session.idempotency WHERE created_at < now() - $1::interval
                       AND tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM session.tenant_move m))
                       ORDER BY created_at LIMIT $2));

-- name: synchronous
-- Whether commits wait for a standby.
SELECT current_setting('synchronous_standby_names') <> ''
       AND current_setting('synchronous_commit') NOT IN ('off', 'local') AS synchronous;

-- name: archive_fails
-- Whether the write-ahead log is to be archived and the last try failed: PostgreSQL keeps it and tries again.
SELECT current_setting('archive_mode') <> 'off'
       AND coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) AS fails
FROM pg_stat_archiver;

-- name: position
-- How far the primary's log is, in bytes.
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS position;

-- name: replayed
-- How far a standby has replayed that log; NULL on a server that is none.
SELECT CASE WHEN pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::bigint END;

-- name: confirm
-- See session.confirm.
SELECT session.confirm();

-- name: take_gone
-- Deleted sessions whose results are to be deleted, the oldest first; others are not given them for a while.
-- $1 how long ago they were deleted at least, $2 how many, $3 for how long
UPDATE session.gone_session g SET try_at = clock_timestamp() + $3::interval * (0.8 + 0.4 * random())
FROM (SELECT session_id FROM session.gone_session
      WHERE gone_at <= clock_timestamp() - $1::interval AND try_at <= clock_timestamp()
      ORDER BY gone_at LIMIT $2 FOR UPDATE SKIP LOCKED) due
WHERE g.session_id = due.session_id
RETURNING g.session_id, g.tenant_id;

-- name: forget_gone
-- Forgets a deleted session that has left nothing.
-- $1 session_id
DELETE FROM session.gone_session WHERE session_id = $1;

-- name: moved_tenants
-- Those that were moved to another cell and are served here no more.
SELECT tenant_id FROM session.tenant_move WHERE state = 3;

-- name: count_gone
-- How many there are, counted up to a limit.
-- $1 limit
SELECT count(*) AS number FROM (SELECT FROM session.gone_session LIMIT $1) g;
