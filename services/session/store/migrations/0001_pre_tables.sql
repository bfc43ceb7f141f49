-- Everything the session service keeps. Times named *_ms are Unix milliseconds; leases use timestamptz and
-- PostgreSQL's clock. Every table that belongs to a tenant carries its id.
--
-- Locks are always taken in this order: lease, session, run, tool_call. The lease row is a session's mutex.

CREATE SCHEMA IF NOT EXISTS session;

CREATE FUNCTION session.now_ms() RETURNS bigint
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN (extract(epoch FROM clock_timestamp()) * 1000)::bigint;

-- Rounded up: a moment that has not come is never 0 ms away.
CREATE FUNCTION session.ms_until(p_time timestamptz) RETURNS bigint
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN ceil(extract(epoch FROM p_time - clock_timestamp()) * 1000)::bigint;

CREATE TABLE session.tenant (
    tenant_id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    concurrency smallint NOT NULL DEFAULT 1 CHECK (concurrency BETWEEN 1 AND 4),
    approval_tools text[] NOT NULL DEFAULT '{}',
    run_timeout_ms bigint CHECK (run_timeout_ms > 0)
);
COMMENT ON COLUMN session.tenant.concurrency IS 'ConcurrencyPolicy of input that names none';
COMMENT ON COLUMN session.tenant.approval_tools IS 'tools whose every call a person must approve; * means all';
COMMENT ON COLUMN session.tenant.run_timeout_ms IS 'time limit of runs that set none; NULL means the service''s';

CREATE TABLE session.api_key (
    key_hash text PRIMARY KEY CHECK (key_hash ~ '^[0-9a-f]{64}$'),
    tenant_id uuid NOT NULL REFERENCES session.tenant ON DELETE CASCADE,
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at timestamptz
);
COMMENT ON COLUMN session.api_key.key_hash IS 'SHA-256 of the key, in hex; the key itself is not kept';

CREATE TABLE session.session (
    session_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES session.tenant ON DELETE CASCADE,
    title text NOT NULL,
    metadata jsonb NOT NULL,
    agent text NOT NULL,
    user_name text NOT NULL,
    created_ms bigint NOT NULL,
    updated_ms bigint NOT NULL,
    run_count integer NOT NULL DEFAULT 0,
    message_count integer NOT NULL DEFAULT 0
);
CREATE INDEX session_by_update ON session.session (tenant_id, updated_ms DESC, session_id DESC);
CREATE INDEX session_by_user ON session.session (tenant_id, user_name, updated_ms DESC, session_id DESC);

-- Narrow and half empty, so that an append's UPDATE stays on its page and touches no index (HOT).
CREATE TABLE session.lease (
    session_id uuid PRIMARY KEY REFERENCES session.session ON DELETE CASCADE,
    tenant_id uuid NOT NULL,
    run_id uuid,
    fence bigint NOT NULL DEFAULT 0,
    next_seq integer NOT NULL DEFAULT 1,
    owner text,
    attach integer NOT NULL DEFAULT 0,
    lease_until timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);
COMMENT ON COLUMN session.lease.run_id IS 'the run that held it last; next_seq is of that run';
COMMENT ON COLUMN session.lease.owner IS 'the replica that holds it, NULL when it is free';

CREATE TABLE session.run (
    run_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL REFERENCES session.session ON DELETE CASCADE,
    ordinal integer NOT NULL,
    status smallint NOT NULL CHECK (status BETWEEN 1 AND 6),
    model text NOT NULL,
    options bytea NOT NULL,
    input json,
    attempt integer NOT NULL DEFAULT 0,
    idle_claims smallint NOT NULL DEFAULT 0,
    claim_seq integer NOT NULL DEFAULT 1,
    first_message integer,
    last_seq integer NOT NULL,
    error json,
    input_tokens integer,
    output_tokens integer,
    cached_tokens integer,
    created_ms bigint NOT NULL,
    finished_ms bigint NOT NULL DEFAULT 0,
    cancel_requested boolean NOT NULL DEFAULT false,
    cancel_reason text NOT NULL DEFAULT '',
    rollback boolean NOT NULL DEFAULT false,
    dispatch_after timestamptz,
    left_ms bigint NOT NULL,
    deadline timestamptz,
    UNIQUE (session_id, ordinal)
) WITH (fillfactor = 80);
COMMENT ON COLUMN session.run.input IS 'NULL once its messages are in the conversation: at the first claim';
COMMENT ON COLUMN session.run.last_seq IS 'as of the last change of this row; while the run is held, lease.next_seq knows better';
COMMENT ON COLUMN session.run.claim_seq IS 'the next_seq of the last claim';
COMMENT ON COLUMN session.run.first_message IS
    'ordinal of its first message; it and what follows while the run is not finished are the run''s own';
COMMENT ON COLUMN session.run.idle_claims IS 'claims in a row that moved nothing';
COMMENT ON COLUMN session.run.rollback IS 'drop its messages from the conversation once it ends';
COMMENT ON COLUMN session.run.dispatch_after IS 'NULL while another run of the session goes first';
COMMENT ON COLUMN session.run.left_ms IS 'how long it may take, as of when its time last stood still';
COMMENT ON COLUMN session.run.deadline IS
    'when its time is up; NULL while it stands still: before the first claim, and while a person is awaited';

-- Few rows each, whatever the number of finished runs.
CREATE INDEX run_unfinished ON session.run (session_id, ordinal) WHERE status < 4;
CREATE INDEX run_due ON session.run (tenant_id, dispatch_after)
    WHERE status IN (1, 2) AND dispatch_after IS NOT NULL;
CREATE INDEX run_overdue ON session.run (deadline) WHERE status IN (1, 2) AND deadline IS NOT NULL;
CREATE INDEX run_cancelling ON session.run (session_id) WHERE status IN (1, 2) AND cancel_requested;
CREATE INDEX run_waiting ON session.run (tenant_id, run_id) WHERE status = 3;

CREATE TABLE session.message (
    session_id uuid NOT NULL REFERENCES session.session ON DELETE CASCADE,
    message_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    run_id uuid NOT NULL,
    ordinal integer NOT NULL,
    role text NOT NULL,
    content text NOT NULL,
    tool_calls text NOT NULL,
    tool_call_id text NOT NULL,
    created_ms bigint NOT NULL,
    rolled_back boolean NOT NULL DEFAULT false,
    PRIMARY KEY (session_id, message_id)
);
CREATE UNIQUE INDEX message_by_ordinal ON session.message (session_id, ordinal) WHERE NOT rolled_back;

-- The log. No foreign key: an append costs one index entry. data is JSON as text, the bytes its writer made.
CREATE TABLE session.event (
    run_id uuid NOT NULL,
    seq integer NOT NULL,
    time_ms bigint NOT NULL,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    fence bigint NOT NULL,
    type text NOT NULL,
    data text NOT NULL,
    PRIMARY KEY (run_id, seq)
) PARTITION BY RANGE (run_id);
CREATE TABLE session.event_default PARTITION OF session.event DEFAULT;

CREATE TABLE session.tool_call (
    call_id text PRIMARY KEY,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL REFERENCES session.session ON DELETE CASCADE,
    run_id uuid NOT NULL,
    position integer GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    arguments text NOT NULL,
    effect smallint NOT NULL CHECK (effect BETWEEN 1 AND 3),
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 5),
    content text NOT NULL DEFAULT '',
    content_ref text NOT NULL DEFAULT '',
    idempotency_key text NOT NULL,
    fence bigint NOT NULL DEFAULT 0,
    tries integer NOT NULL DEFAULT 0,
    quiet_at timestamptz,
    needs_approval boolean NOT NULL DEFAULT false,
    unsaid text NOT NULL DEFAULT '',
    unsaid_ms bigint NOT NULL DEFAULT 0,
    created_ms bigint NOT NULL
);
CREATE INDEX tool_call_by_run ON session.tool_call (run_id);
CREATE INDEX tool_call_by_session ON session.tool_call (session_id);
COMMENT ON COLUMN session.tool_call.fence IS 'under which it was begun last';
COMMENT ON COLUMN session.tool_call.tries IS 'how often it was begun';
COMMENT ON COLUMN session.tool_call.quiet_at IS 'from when on no try that was begun can act any more; NULL: none was';
COMMENT ON COLUMN session.tool_call.needs_approval IS 'a person has to agree before it may begin; false once one has';
COMMENT ON COLUMN session.tool_call.unsaid IS
    'the data of an action.resolved that was decided while an agent held the run, and is not in the log yet';

CREATE TABLE session.idempotency (
    tenant_id uuid NOT NULL,
    scope text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    result_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, scope, key)
);
CREATE INDEX idempotency_by_age ON session.idempotency (created_at);

-- Whether a call waits for a person: it is not known what it did, or it needs approval.
CREATE FUNCTION session.call_waits(p_state smallint, p_needs_approval boolean) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN p_state = 5 OR (p_state = 1 AND p_needs_approval);

-- How much longer, in milliseconds, a try that was begun may still act.
CREATE FUNCTION session.quiet_in_ms(p_quiet_at timestamptz) RETURNS bigint
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN coalesce(greatest(0, ceil(extract(epoch FROM p_quiet_at - clock_timestamp()) * 1000)), 0)::bigint;

-- A run as its readers see it; last_seq is exact while it is held, too.
CREATE VIEW session.run_view AS
SELECT r.run_id, r.session_id, r.tenant_id, r.ordinal, r.status, r.model, r.attempt,
       CASE WHEN l.run_id = r.run_id THEN greatest(r.last_seq, l.next_seq - 1) ELSE r.last_seq END AS last_seq,
       r.error, r.input_tokens, r.output_tokens, r.cached_tokens, r.created_ms, r.finished_ms,
       r.cancel_requested, r.cancel_reason, r.options,
       CASE WHEN r.deadline IS NULL THEN r.left_ms ELSE session.ms_until(r.deadline) END AS time_left_ms
FROM session.run r
JOIN session.lease l USING (session_id);

-- A session as its readers see it; the active run is the oldest that is not finished.
CREATE VIEW session.session_view AS
SELECT s.session_id, s.tenant_id, s.title, s.metadata, s.agent, s.user_name, s.created_ms, s.updated_ms,
       s.message_count,
       (SELECT r.run_id FROM session.run r WHERE r.session_id = s.session_id AND r.status < 4
        ORDER BY r.ordinal LIMIT 1) AS active_run_id
FROM session.session s;
