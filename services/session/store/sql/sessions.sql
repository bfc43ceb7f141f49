-- Sessions and messages.

-- name: create_session
-- Makes a session with its lease row, and remembers the request id if there is one. With a request id that
-- is taken nothing is made, and no row returned.
-- $1 tenant_id, $2 session_id, $3 title, $4 metadata, $5 agent, $6 user, $7 request_id or NULL, $8 fingerprint
WITH key AS (
    INSERT INTO session.idempotency (tenant_id, scope, key, fingerprint, result_id)
    SELECT $1::uuid, 'session', $7::text, $8::bytea, $2::uuid WHERE $7::text IS NOT NULL
    ON CONFLICT (tenant_id, scope, key) DO NOTHING
    RETURNING result_id
), made AS (
    INSERT INTO session.session (session_id, tenant_id, title, metadata, agent, user_name, created_ms, updated_ms)
    SELECT $2::uuid, $1::uuid, $3::text, $4::jsonb, $5::text, $6::text, t.ms, t.ms
    FROM (SELECT session.now_ms() AS ms) t
    WHERE $7::text IS NULL OR EXISTS (SELECT FROM key)
    RETURNING *
), lease AS (
    INSERT INTO session.lease (session_id, tenant_id) SELECT session_id, tenant_id FROM made
)
SELECT session_id, tenant_id, title, metadata, agent, user_name, created_ms, updated_ms, message_count,
       NULL::uuid AS active_run_id
FROM made;

-- name: find_request
-- What a request id made; for an answer that it was made before.
-- $1 tenant_id, $2 scope, $3 key
SELECT fingerprint, result_id, session.confirm() FROM session.idempotency WHERE tenant_id = $1 AND scope = $2 AND key = $3;

-- name: get_session
-- One session of a tenant.
-- $1 tenant_id, $2 session_id
SELECT * FROM session.session_view WHERE session_id = $2 AND tenant_id = $1;

-- name: list_sessions
-- A tenant's sessions, last changed first, after a position.
-- $1 tenant_id, $2 updated_ms and $3 session_id of the last one seen, $4 how many
SELECT * FROM session.session_view
WHERE tenant_id = $1 AND (updated_ms, session_id) < ($2::bigint, $3::uuid)
ORDER BY updated_ms DESC, session_id DESC
LIMIT $4;

-- name: list_sessions_of_user
-- As list_sessions, of one user.
-- $1 tenant_id, $2 updated_ms and $3 session_id of the last one seen, $4 how many, $5 user
SELECT * FROM session.session_view
WHERE tenant_id = $1 AND user_name = $5 AND (updated_ms, session_id) < ($2::bigint, $3::uuid)
ORDER BY updated_ms DESC, session_id DESC
LIMIT $4;

-- name: update_session
-- Sets the title if one is given, and labels; a label with an empty value goes. No row, too, if there would be more
-- than $6 labels; where there are more already, they may still be changed and removed.
-- $1 tenant_id, $2 session_id, $3 title or NULL, $4 labels to set, $5 labels to remove, $6 most labels
UPDATE session.session s
SET title = coalesce($3, s.title), metadata = (s.metadata || $4::jsonb) - $5::text[],
    updated_ms = greatest(s.updated_ms, session.now_ms())
WHERE s.session_id = $2 AND s.tenant_id = $1
  AND (SELECT count(*) FROM jsonb_object_keys((s.metadata || $4::jsonb) - $5::text[]))
      <= greatest($6::bigint, (SELECT count(*) FROM jsonb_object_keys(s.metadata)))
RETURNING s.session_id;

-- name: lock_lease
-- Locks a session's lease row, waiting for appends under way.
-- $1 tenant_id, $2 session_id
SELECT session_id FROM session.lease WHERE session_id = $2 AND tenant_id = $1 FOR UPDATE;

-- name: calls_under_way
-- A session's calls that may act now: a try was begun, is not known to have ended, and not so long ago that it must have.
-- A pure one changes nothing. The caller holds the lease row, so that none begins meanwhile.
-- $1 tenant_id, $2 session_id
SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms
FROM session.tool_call c
WHERE c.session_id = $2 AND c.tenant_id = $1 AND c.tries > c.ended_try AND c.effect > 1
  AND c.quiet_at > clock_timestamp()
ORDER BY c.run_id, c.position;

-- name: delete_events
-- Deletes the log of a session's runs.
-- $1 tenant_id, $2 session_id
DELETE FROM session.event e USING session.run r
WHERE r.session_id = $2 AND r.tenant_id = $1 AND e.run_id = r.run_id;

-- name: delete_session
-- Deletes a session with its lease, messages, runs and tool calls.
-- $1 tenant_id, $2 session_id
DELETE FROM session.session WHERE session_id = $2 AND tenant_id = $1 RETURNING session_id;

-- name: list_messages
-- A session's messages, oldest first, after an ordinal. Those past so many bytes come without their text.
-- $1 tenant_id, $2 session_id, $3 ordinal, $4 how many, $5 how many bytes
SELECT message_id, session_id, run_id, ordinal, role, CASE WHEN fits THEN content ELSE '' END AS content,
       CASE WHEN fits THEN tool_calls ELSE '' END AS tool_calls, tool_call_id, created_ms, fits
FROM (
    SELECT m.*, sum(size) OVER (ORDER BY ordinal) - size < $5::bigint AS fits
    FROM (
        SELECT *, octet_length(content) + octet_length(tool_calls) AS size
        FROM session.message
        WHERE session_id = $2 AND tenant_id = $1 AND ordinal > $3 AND NOT rolled_back
        ORDER BY ordinal
        LIMIT $4
    ) m
) p
ORDER BY ordinal;

-- name: history
-- A session's newest messages up to an ordinal within two limits, oldest first.
-- $1 tenant_id, $2 session_id, $3 ordinal, $4 how many, $5 how many bytes
SELECT message_id, session_id, run_id, ordinal, role, content, tool_calls, tool_call_id, created_ms
FROM (
    SELECT *, sum(octet_length(content) + octet_length(tool_calls)) OVER (ORDER BY ordinal DESC) AS bytes
    FROM session.message
    WHERE session_id = $2 AND tenant_id = $1 AND ordinal > $3::integer - $4::integer AND ordinal <= $3
      AND NOT rolled_back
) m
WHERE bytes <= $5
ORDER BY ordinal;
