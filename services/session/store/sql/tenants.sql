-- Tenants and their API keys.

-- name: tenant_of_key
-- The tenant of a key that is not revoked, and whether it was moved to another cell.
-- $1 key_hash
SELECT k.tenant_id, m.state IS NOT NULL AS moved
FROM session.api_key k LEFT JOIN session.tenant_move m ON m.tenant_id = k.tenant_id AND m.state = 3
WHERE k.key_hash = $1 AND k.revoked_at IS NULL;

-- name: ensure_tenant
-- Makes a tenant unless its name is there, and returns the one that is.
-- $1 tenant_id if it is new, $2 name
INSERT INTO session.tenant (tenant_id, name) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING tenant_id;

-- name: get_tenant
-- One tenant and its settings.
-- $1 name
SELECT tenant_id, name, concurrency, approval_tools, run_timeout_ms FROM session.tenant WHERE name = $1;

-- name: set_tenant
-- Changes what is given of a tenant's settings; a time limit of 0 takes its own away.
-- $1 name, $2 concurrency or NULL, $3 approval_tools or NULL, $4 run_timeout_ms or NULL
UPDATE session.tenant
SET concurrency = coalesce($2, concurrency), approval_tools = coalesce($3::text[], approval_tools),
    run_timeout_ms = CASE WHEN $4::bigint IS NULL THEN run_timeout_ms ELSE nullif($4::bigint, 0) END
WHERE name = $1
RETURNING tenant_id, name, concurrency, approval_tools, run_timeout_ms;

-- name: ensure_key
-- Makes a key unless it is there; a revoked one stays revoked. Returns whose it is.
-- $1 key_hash, $2 tenant_id, $3 name
INSERT INTO session.api_key AS k (key_hash, tenant_id, name) VALUES ($1, $2, $3)
ON CONFLICT (key_hash) DO UPDATE SET name = k.name
RETURNING tenant_id, revoked_at IS NOT NULL AS revoked;
