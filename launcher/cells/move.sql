-- What moving a tenant between two databases asks of each of them. `hermesh.moving` names the tenant for whom a
-- transaction may change what is frozen.

-- name: set_moving
-- For one transaction. $1 tenant_id as text
SELECT set_config('hermesh.moving', $1, true);

-- name: migrations
-- What was applied, to compare.
SELECT 'session' AS schema, name FROM session.hermesh_migration
UNION ALL SELECT 'memory', name FROM memory.hermesh_migration ORDER BY 1, 2;

-- name: clock
-- The server's time in milliseconds.
SELECT extract(epoch FROM clock_timestamp())::float8 * 1000 AS ms;

-- name: tenant_by_name
-- A tenant. $1 name
SELECT tenant_id FROM session.tenant WHERE name = $1;

-- name: state
-- How a tenant is held here, if it is; a half of it counts as the whole. $1 tenant_id
SELECT coalesce(s.state, m.state) AS state, coalesce(s.cell, m.cell) AS cell
FROM (SELECT $1::uuid AS tenant_id) t
LEFT JOIN session.tenant_move s USING (tenant_id) LEFT JOIN memory.tenant_move m USING (tenant_id)
WHERE s.state IS NOT NULL OR m.state IS NOT NULL;

-- name: moved_from
-- The tenant of a name, and to which cell it was moved. $1 name
SELECT t.tenant_id, m.cell FROM session.tenant t JOIN session.tenant_move m USING (tenant_id)
WHERE t.name = $1 AND m.state = 3;

-- name: hold_target
-- Keeps a tenant that is to come from being changed here; one that is served here already is left alone.
-- $1 tenant_id, $2 the cell that it comes from
WITH session AS (
    INSERT INTO session.tenant_move (tenant_id, state, cell)
    SELECT $1::uuid, 2, $2::text WHERE NOT EXISTS (SELECT FROM session.tenant WHERE tenant_id = $1)
    ON CONFLICT (tenant_id) DO NOTHING RETURNING tenant_id, state, cell
)
INSERT INTO memory.tenant_move (tenant_id, state, cell) SELECT tenant_id, state, cell FROM session
ON CONFLICT (tenant_id) DO NOTHING;

-- name: hold_source
-- Freezes a tenant, unless it is. $1 tenant_id, $2 the cell that it goes to
WITH session AS (
    INSERT INTO session.tenant_move (tenant_id, state, cell) VALUES ($1, 1, $2) ON CONFLICT (tenant_id) DO NOTHING
)
INSERT INTO memory.tenant_move (tenant_id, state, cell) VALUES ($1, 1, $2) ON CONFLICT (tenant_id) DO NOTHING;

-- name: leave
-- A frozen tenant is another cell's from now on; how many rows say so. $1 tenant_id
WITH session AS (
    UPDATE session.tenant_move SET state = 3, since = clock_timestamp() WHERE tenant_id = $1 AND state = 1
    RETURNING tenant_id
), memory AS (
    UPDATE memory.tenant_move SET state = 3, since = clock_timestamp()
    WHERE tenant_id IN (SELECT tenant_id FROM session)
)
SELECT count(*) FROM session;

-- name: thaw
-- A frozen tenant works again; how many rows said that it was. $1 tenant_id
WITH session AS (DELETE FROM session.tenant_move WHERE tenant_id = $1 AND state = 1 RETURNING tenant_id),
memory AS (DELETE FROM memory.tenant_move WHERE tenant_id IN (SELECT tenant_id FROM session))
SELECT count(*) FROM session;

-- name: lock_state
-- How a tenant is held, locked for a transaction: nobody else's command goes on with it meanwhile. $1 tenant_id
SELECT state FROM session.tenant_move WHERE tenant_id = $1 FOR UPDATE;

-- name: free
-- A tenant is held no more. $1 tenant_id
WITH session AS (DELETE FROM session.tenant_move WHERE tenant_id = $1)
DELETE FROM memory.tenant_move WHERE tenant_id = $1;

-- name: writers
-- The transactions that may have begun to change something before a tenant was frozen.
SELECT DISTINCT l.virtualtransaction FROM pg_locks l
WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.relation = ANY (ARRAY['session.session', 'session.lease', 'session.run', 'session.message',
                              'session.tool_call', 'session.idempotency', 'session.tenant', 'session.api_key',
                              'memory.item', 'memory.preference']::regclass[]::oid[]);

-- name: still_open
-- Which of these transactions are not over. $1 as of `writers`
SELECT DISTINCT virtualtransaction FROM pg_locks WHERE virtualtransaction = ANY ($1::text[]);

-- name: take_leases
-- Takes every lease of a tenant from its agent, under a new fence, in the order in which everybody locks them.
-- $1 tenant_id
WITH held AS MATERIALIZED (
    SELECT l.session_id FROM session.lease l
    WHERE l.session_id IN (SELECT s.session_id FROM session.session s WHERE s.tenant_id = $1)
      AND l.owner IS NOT NULL
    ORDER BY l.session_id FOR NO KEY UPDATE
)
UPDATE session.lease l SET fence = l.fence + 1, attach = 0, owner = NULL, lease_until = NULL
FROM held WHERE l.session_id = held.session_id
RETURNING l.run_id;

-- name: session_ids
-- All of a tenant. $1 tenant_id
SELECT session_id FROM session.session WHERE tenant_id = $1 ORDER BY session_id;

-- name: session_digests
-- All that is kept of some sessions, in a few bytes each. Events are never changed and have no gap, so that their number
-- tells whether there are more; their text is read where it was not compared before.
-- $1 session_ids, $2 whether to read events' text
SELECT s.session_id, md5(concat_ws('|', s::text,
    (SELECT l::text FROM session.lease l WHERE l.session_id = s.session_id),
    (SELECT count(*) || md5(string_agg(md5(r::text), '' ORDER BY r.ordinal))
     FROM session.run r WHERE r.session_id = s.session_id),
    (SELECT count(*) || md5(string_agg(md5(m::text), '' ORDER BY m.message_id))
     FROM session.message m WHERE m.session_id = s.session_id),
    (SELECT count(*) || md5(string_agg(md5(c::text), '' ORDER BY c.call_id COLLATE "C"))
     FROM session.tool_call c WHERE c.session_id = s.session_id),
    CASE WHEN $2::boolean THEN
        (SELECT count(*) || md5(string_agg(md5(e::text), '' ORDER BY e.run_id, e.seq))
         FROM session.run r JOIN session.event e USING (run_id) WHERE r.session_id = s.session_id)
    ELSE
        (SELECT string_agg(r.run_id || ' ' || (SELECT count(*) FROM session.event e WHERE e.run_id = r.run_id), ','
                           ORDER BY r.run_id)
         FROM session.run r WHERE r.session_id = s.session_id)
    END)) AS digest
FROM session.session s WHERE s.session_id = ANY ($1::uuid[]);

-- name: copy_session
-- Sessions. $1 session_ids
SELECT t.* FROM session.session t WHERE t.session_id = ANY ($1::uuid[]);

-- name: copy_lease
-- Their leases. $1 session_ids
SELECT t.* FROM session.lease t WHERE t.session_id = ANY ($1::uuid[]);

-- name: copy_run
-- Their runs. $1 session_ids
SELECT t.* FROM session.run t WHERE t.session_id = ANY ($1::uuid[]);

-- name: copy_message
-- Their messages. $1 session_ids
SELECT t.* FROM session.message t WHERE t.session_id = ANY ($1::uuid[]);

-- name: copy_tool_call
-- Their tool calls. $1 session_ids
SELECT t.* FROM session.tool_call t WHERE t.session_id = ANY ($1::uuid[]);

-- name: copy_event
-- Their runs' events. $1 session_ids
SELECT t.* FROM session.run r JOIN session.event t USING (run_id) WHERE r.session_id = ANY ($1::uuid[]);

-- name: drop_events
-- Deletes the log of some sessions. $1 session_ids
DELETE FROM session.event e USING session.run r
WHERE r.session_id = ANY ($1::uuid[]) AND e.run_id = r.run_id;

-- name: drop_sessions
-- Deletes sessions with all but their log. $1 session_ids
DELETE FROM session.session WHERE session_id = ANY ($1::uuid[]);

-- name: keep_results
-- Forgets that sessions are gone: their results are wanted. $1 session_ids
DELETE FROM session.gone_session WHERE session_id = ANY ($1::uuid[]);

-- name: columns
-- A table's columns, in its order. $1 schema.table
SELECT attname::text AS name FROM pg_attribute
WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum;

-- name: get_tenant
-- A tenant's row. $1 tenant_id
SELECT * FROM session.tenant WHERE tenant_id = $1;

-- name: put_tenant
-- Makes a tenant, or brings it up to date. $1 tenant_id, $2 name, $3 created_at, $4 concurrency, $5 approval_tools, $6 run_timeout_ms
INSERT INTO session.tenant (tenant_id, name, created_at, concurrency, approval_tools, run_timeout_ms)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (tenant_id) DO UPDATE SET name = excluded.name, concurrency = excluded.concurrency,
    approval_tools = excluded.approval_tools, run_timeout_ms = excluded.run_timeout_ms;

-- name: digests_api_key
-- A tenant's keys, in buckets. $1 tenant_id
SELECT left(t.key_hash, 1) AS bucket, count(*) || md5(string_agg(md5(t::text), '' ORDER BY t.key_hash COLLATE "C")) AS digest
FROM session.api_key t WHERE t.tenant_id = $1 GROUP BY 1;

-- name: copy_api_key
-- Some buckets of them. $1 tenant_id, $2 buckets
SELECT t.* FROM session.api_key t WHERE t.tenant_id = $1 AND left(t.key_hash, 1) = ANY ($2::text[]);

-- name: drop_api_key
-- Deletes some buckets of them. $1 tenant_id, $2 buckets
DELETE FROM session.api_key t WHERE t.tenant_id = $1 AND left(t.key_hash, 1) = ANY ($2::text[]);

-- name: digests_idempotency
-- A tenant's idempotency keys, in buckets. $1 tenant_id
SELECT left(md5(t.scope || t.key), 2) AS bucket,
       count(*) || md5(string_agg(md5(t::text), '' ORDER BY t.scope COLLATE "C", t.key COLLATE "C")) AS digest
FROM session.idempotency t WHERE t.tenant_id = $1 GROUP BY 1;

-- name: copy_idempotency
-- Some buckets of them. $1 tenant_id, $2 buckets
SELECT t.* FROM session.idempotency t
WHERE t.tenant_id = $1 AND left(md5(t.scope || t.key), 2) = ANY ($2::text[]);

-- name: drop_idempotency
-- Deletes some buckets of them. $1 tenant_id, $2 buckets
DELETE FROM session.idempotency t
WHERE t.tenant_id = $1 AND left(md5(t.scope || t.key), 2) = ANY ($2::text[]);

-- name: digests_item
-- A tenant's memories, in buckets. $1 tenant_id
SELECT left(md5(t.memory_id::text), 2) AS bucket, count(*) || md5(string_agg(md5(t::text), '' ORDER BY t.memory_id)) AS digest
FROM memory.item t WHERE t.tenant_id = $1 GROUP BY 1;

-- name: copy_item
-- Some buckets of them. $1 tenant_id, $2 buckets
SELECT t.* FROM memory.item t WHERE t.tenant_id = $1 AND left(md5(t.memory_id::text), 2) = ANY ($2::text[]);

-- name: drop_item
-- Deletes some buckets of them. $1 tenant_id, $2 buckets
DELETE FROM memory.item t WHERE t.tenant_id = $1 AND left(md5(t.memory_id::text), 2) = ANY ($2::text[]);

-- name: digests_preference
-- A tenant's users' preferences, in buckets. $1 tenant_id
SELECT left(md5(t.user_name), 2) AS bucket, count(*) || md5(string_agg(md5(t::text), '' ORDER BY t.user_name COLLATE "C")) AS digest
FROM memory.preference t WHERE t.tenant_id = $1 GROUP BY 1;

-- name: copy_preference
-- Some buckets of them. $1 tenant_id, $2 buckets
SELECT t.* FROM memory.preference t WHERE t.tenant_id = $1 AND left(md5(t.user_name), 2) = ANY ($2::text[]);

-- name: drop_preference
-- Deletes some buckets of them. $1 tenant_id, $2 buckets
DELETE FROM memory.preference t WHERE t.tenant_id = $1 AND left(md5(t.user_name), 2) = ANY ($2::text[]);

-- name: results
-- The large results that a tenant's tool calls refer to. $1 tenant_id
SELECT DISTINCT c.session_id, c.content_ref
FROM session.session s JOIN session.tool_call c USING (session_id)
WHERE s.tenant_id = $1 AND c.content_ref <> '' ORDER BY 1, 2;

-- name: last_position
-- The highest place of a tenant's tool calls, 0 without any. $1 tenant_id
SELECT coalesce(max(c.position), 0) FROM session.session s JOIN session.tool_call c USING (session_id)
WHERE s.tenant_id = $1;

-- name: go_past
-- Lets the places of later tool calls come after one; by far, since others take some meanwhile. $1 position
SELECT CASE WHEN (SELECT last_value FROM session.tool_call_position_seq) <= $1::bigint
            THEN setval('session.tool_call_position_seq', $1::bigint + 1000) END;

-- name: allow_for_clocks
-- Until when a try may act was said by another server's clock. $1 tenant_id, $2 by how much they may differ, in ms
UPDATE session.tool_call c SET quiet_at = c.quiet_at + $2::float8 * interval '1 millisecond'
FROM session.session s
WHERE s.tenant_id = $1 AND c.session_id = s.session_id AND c.quiet_at > clock_timestamp() - interval '1 minute';

-- name: drop_tenant
-- Deletes a tenant of which nothing but keys is left. $1 tenant_id
DELETE FROM session.tenant WHERE tenant_id = $1;

-- name: wake
-- Tells the session service that runs wait.
SELECT pg_notify('hermesh_due', '');
