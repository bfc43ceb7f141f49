-- Tenants and their API keys.

-- name: tenant_of_key
-- The tenant of a key that is not revoked.
-- $1 key_hash
SELECT tenant_id FROM session.api_key WHERE key_hash = $1 AND revoked_at IS NULL;

-- name: ensure_tenant
-- Makes a tenant unless its name is there, and returns the one that is.
-- $1 tenant_id if it is new, $2 name
INSERT INTO session.tenant (tenant_id, name) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING tenant_id;

-- name: ensure_key
-- Makes a key unless it is there; a revoked one stays revoked. Returns whose it is.
-- $1 key_hash, $2 tenant_id, $3 name
INSERT INTO session.api_key AS k (key_hash, tenant_id, name) VALUES ($1, $2, $3)
ON CONFLICT (key_hash) DO UPDATE SET name = k.name
RETURNING tenant_id, revoked_at IS NOT NULL AS revoked;
