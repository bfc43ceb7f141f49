-- name: remember
-- Stores a memory unless its scope is full or its request id was used; then there is no row.
-- $1 id, $2 tenant, $3 $4 scope, $5 text, $6 importance, $7 source session, $8 ttl in ms or null,
-- $9 request id or null, $10 request hash, $11 model, $12 vector, $13 most memories of a scope.
INSERT INTO memory.item (
    memory_id, tenant_id, scope_kind, scope_owner, text, importance, source_session_id, expire_at,
    request_id, request_hash, model, embedding
)
SELECT $1::uuid, $2::uuid, $3::smallint, $4::text, $5::text, $6::real, $7::uuid,
    clock_timestamp() + $8::bigint * interval '1 millisecond',
    $9::text, $10::bytea, $11::text, $12::real[]::vector
WHERE (
    SELECT count(*)
    FROM (
        SELECT 1
        FROM memory.item
        WHERE tenant_id = $2 AND scope_kind = $3 AND scope_owner = $4
        LIMIT $13::bigint
    ) AS kept
) < $13::bigint
ON CONFLICT (tenant_id, request_id) WHERE request_id IS NOT NULL DO NOTHING
RETURNING memory_id, scope_kind, scope_owner, text, importance, source_session_id, created_at, expire_at;

-- name: find_request
-- The memory that a request id stored. $1 tenant, $2 request id. The answer that it was stored before waits for a
-- synchronous standby as the first one should have: by a record that keeps nothing, whose commit waits.
SELECT memory_id, scope_kind, scope_owner, text, importance, source_session_id, created_at, expire_at,
    request_hash,
    CASE WHEN current_setting('synchronous_standby_names') <> ''
         THEN pg_logical_emit_message(true, 'hermesh', '')::text END AS confirmed
FROM memory.item
WHERE tenant_id = $1 AND request_id = $2;

-- name: recall
-- A scope's memories nearest to a vector, best first; `score` is the cosine.
-- $1 tenant, $2 $3 scope, $4 model, $5 vector, $6 least score, $7 weight of importance, $8 limit.
WITH query AS MATERIALIZED (
    SELECT $5::real[]::vector AS embedding
),
near AS (
    SELECT found.memory_id, found.score
    FROM (
        -- OFFSET 0 keeps the planner from computing the distance once for each use of it.
        SELECT item.memory_id, item.importance, -(item.embedding <#> query.embedding) AS score
        FROM memory.item AS item, query
        WHERE item.tenant_id = $1 AND item.scope_kind = $2 AND item.scope_owner = $3 AND item.model = $4
            AND (item.expire_at IS NULL OR item.expire_at > clock_timestamp())
        OFFSET 0
    ) AS found
    WHERE found.score >= $6::float8
    ORDER BY found.score + $7::float8 * (found.importance - 0.5) DESC, found.memory_id DESC
    LIMIT $8::bigint
)
SELECT item.memory_id, item.scope_kind, item.scope_owner, item.text, item.importance,
    item.source_session_id, item.created_at, item.expire_at, near.score
FROM near
JOIN memory.item AS item USING (memory_id)
ORDER BY near.score + $7::float8 * (item.importance - 0.5) DESC, memory_id DESC;

-- name: list_memories
-- A scope's memories, newest first. $1 tenant, $2 $3 scope, $4 id to go on before or null, $5 limit.
SELECT memory_id, scope_kind, scope_owner, text, importance, source_session_id, created_at, expire_at
FROM memory.item
WHERE tenant_id = $1 AND scope_kind = $2 AND scope_owner = $3
    AND ($4::uuid IS NULL OR memory_id < $4)
    AND (expire_at IS NULL OR expire_at > clock_timestamp())
ORDER BY memory_id DESC
LIMIT $5::bigint;

-- name: forget
-- Deletes one memory. $1 tenant, $2 id. That there was none to delete waits for a synchronous standby, as in
-- find_request: a delete before this one may be in this server alone.
WITH gone AS (
    DELETE FROM memory.item WHERE tenant_id = $1 AND memory_id = $2 RETURNING 1
)
SELECT count(*),
    CASE WHEN count(*) = 0 AND current_setting('synchronous_standby_names') <> ''
         THEN pg_logical_emit_message(true, 'hermesh', '')::text END AS confirmed
FROM gone;

-- name: forget_scope
-- Deletes all memories of a scope. $1 tenant, $2 $3 scope. That there were none waits as in forget.
WITH gone AS (
    DELETE FROM memory.item WHERE tenant_id = $1 AND scope_kind = $2 AND scope_owner = $3 RETURNING 1
)
SELECT count(*),
    CASE WHEN count(*) = 0 AND current_setting('synchronous_standby_names') <> ''
         THEN pg_logical_emit_message(true, 'hermesh', '')::text END AS confirmed
FROM gone;

-- name: sweep
-- Removes expired memories of all tenants. Replicas that sweep at once skip each other's. $1 limit.
WITH due AS (
    SELECT memory_id
    FROM memory.item
    WHERE expire_at <= clock_timestamp()
        AND tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM memory.tenant_move m))
    ORDER BY expire_at
    LIMIT $1::bigint
    FOR UPDATE SKIP LOCKED
),
gone AS (
    DELETE FROM memory.item AS item USING due WHERE item.memory_id = due.memory_id RETURNING 1
)
SELECT count(*) FROM gone;

-- name: other_models
-- Memories of all tenants whose vector is of another model. $1 model, $2 id to go on after or null, $3 limit.
SELECT memory_id, text
FROM memory.item
WHERE model <> $1 AND ($2::uuid IS NULL OR memory_id > $2)
    AND tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM memory.tenant_move m))
ORDER BY memory_id
LIMIT $3::bigint;

-- name: set_vector
-- Replaces a vector. $1 id, $2 the text it is of, $3 model, $4 vector.
UPDATE memory.item
SET model = $3, embedding = $4::real[]::vector
WHERE memory_id = $1 AND text = $2
RETURNING true;

-- name: vector_schema
-- The schema that pgvector is in; no row where the database lacks it.
SELECT quote_ident(n.nspname) FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector';

-- name: ready
-- Whether the tables are there.
SELECT to_regclass('memory.item') IS NOT NULL;
