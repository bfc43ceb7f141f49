-- The memory service's tables, in the schema `memory` (made by the migrator).
CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public;

CREATE TABLE memory.item (
    memory_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    -- 1: a user, 2: a session.
    scope_kind smallint NOT NULL CHECK (scope_kind IN (1, 2)),
    scope_owner text NOT NULL,
    text text NOT NULL,
    importance real NOT NULL CHECK (importance BETWEEN 0 AND 1),
    source_session_id uuid,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expire_at timestamptz,
    request_id text,
    -- SHA-256 of what was asked for, to tell a repeated request from a reused id.
    request_hash bytea,
    -- The embedder: vectors of two of them are never compared.
    model text NOT NULL,
    -- Of length 1, so that the inner product is the cosine.
    embedding vector(256) NOT NULL
);

-- Every read begins with a scope. Within one, the distance to each memory is computed exactly: an index by
-- distance (hnsw) looks at the nearest of all tenants first and finds too few, or none, of this scope.
CREATE INDEX item_scope ON memory.item (tenant_id, scope_kind, scope_owner, memory_id DESC);
CREATE UNIQUE INDEX item_request ON memory.item (tenant_id, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX item_expire ON memory.item (expire_at) WHERE expire_at IS NOT NULL;

CREATE TABLE memory.preference (
    tenant_id uuid NOT NULL,
    user_name text NOT NULL,
    -- One object of texts: a change is one statement on one row, and needs no order of locks.
    preferences jsonb NOT NULL CHECK (jsonb_typeof(preferences) = 'object'),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, user_name)
);
