-- What the suite adds to the database it breaks: a clock that can be set, and a record of every grant and of
-- every tool call's state, written by triggers inside the very transactions they tell of.

-- name: clock
-- Before the services' schema is made, so that their functions find this clock and not PostgreSQL's own.
CREATE SCHEMA chaos;
CREATE TABLE chaos.clock (ahead interval NOT NULL);
INSERT INTO chaos.clock VALUES ('0');
CREATE FUNCTION chaos.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    RETURN pg_catalog.clock_timestamp() + (SELECT ahead FROM chaos.clock);
CREATE FUNCTION chaos.now() RETURNS timestamptz LANGUAGE sql STABLE
    RETURN pg_catalog.now() + (SELECT ahead FROM chaos.clock);
ALTER DATABASE postgres SET search_path = chaos, pg_catalog, public;

-- name: triggers
-- Once the services' schema is there.
-- One order for both: what they tell of is done under the lock of the session's lease row.
CREATE SEQUENCE chaos.place;
CREATE TABLE chaos.grants (
    n bigint PRIMARY KEY DEFAULT nextval('chaos.place'),
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    session uuid, run uuid, fence bigint, attach integer, next_seq integer, owner text
);
CREATE TABLE chaos.calls (
    n bigint PRIMARY KEY DEFAULT nextval('chaos.place'),
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    session uuid, call text, run uuid, old smallint, new smallint, fence bigint
);
CREATE FUNCTION chaos.note_grant() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.grants (session, run, fence, attach, next_seq, owner)
    VALUES (NEW.session_id, NEW.run_id, NEW.fence, NEW.attach, NEW.next_seq, NEW.owner);
    RETURN NULL;
END $$;
CREATE FUNCTION chaos.note_call() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.calls (session, call, run, old, new, fence)
    VALUES (NEW.session_id, NEW.call_id, NEW.run_id, CASE TG_OP WHEN 'INSERT' THEN 0 ELSE OLD.state END,
            NEW.state, NEW.fence);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_grant AFTER UPDATE ON session.lease FOR EACH ROW
    WHEN (OLD.fence IS DISTINCT FROM NEW.fence OR OLD.run_id IS DISTINCT FROM NEW.run_id
          OR OLD.owner IS NULL AND NEW.owner IS NOT NULL)
    EXECUTE FUNCTION chaos.note_grant();
CREATE TRIGGER chaos_call_made AFTER INSERT ON session.tool_call FOR EACH ROW EXECUTE FUNCTION chaos.note_call();
CREATE TRIGGER chaos_call_moved AFTER UPDATE ON session.tool_call FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.fence IS DISTINCT FROM NEW.fence)
    EXECUTE FUNCTION chaos.note_call();

-- name: set_clock
-- Moves the clock.
-- $1 how far ahead
UPDATE chaos.clock SET ahead = $1;

-- name: forget
-- What was recorded so far is of an episode before.
TRUNCATE chaos.grants, chaos.calls;

-- name: unfinished
-- Runs of some sessions that are neither over nor waiting for a person.
-- $1 session ids
SELECT run_id FROM session.run WHERE session_id = ANY($1::uuid[]) AND status IN (1, 2);

-- name: working
-- Runs of anybody's that are neither over nor waiting for a person.
SELECT run_id FROM session.run WHERE status IN (1, 2);

-- name: grants
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT n AS "order", extract(epoch FROM at)::float AS t, session::text, run::text, fence, attach, next_seq, owner
FROM chaos.grants WHERE session = ANY($1::uuid[]) ORDER BY n;

-- name: calls
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT n AS "order", extract(epoch FROM at)::float AS t, call, run::text, old AS "from", new AS "to", fence
FROM chaos.calls WHERE session = ANY($1::uuid[]) ORDER BY n;

-- name: log
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT e.run_id::text AS run, r.session_id::text AS session, e.seq, e.type, e.data, e.fence,
       extract(epoch FROM pg_xact_commit_timestamp(e.xmin))::float AS committed,
       CASE WHEN e.type = 'run.failed' THEN e.data::json ->> 'reason' END AS reason,
       CASE WHEN e.type LIKE 'action.%' THEN e.data::json ->> 'call_id' END AS call
FROM session.run r JOIN session.event e USING (run_id)
WHERE r.session_id = ANY($1::uuid[]) ORDER BY r.session_id, r.ordinal, e.seq;

-- name: run_row
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT run_id::text AS run, session_id::text AS session, ordinal, status, last_seq, attempt, cancel_requested
FROM session.run WHERE session_id = ANY($1::uuid[]) ORDER BY session_id, ordinal;

-- name: message
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT session_id::text AS session, message_id::text AS message, run_id::text AS run, ordinal, role, content,
       rolled_back
FROM session.message WHERE session_id = ANY($1::uuid[]) ORDER BY session_id, ordinal;

-- name: lease_row
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT session_id::text AS session, run_id::text AS run, fence, next_seq, owner
FROM session.lease WHERE session_id = ANY($1::uuid[]);

-- name: call_row
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT call_id AS call, run_id::text AS run, name, effect, state, idempotency_key AS key, fence
FROM session.tool_call WHERE session_id = ANY($1::uuid[]) ORDER BY position;

-- name: key_row
-- As tests/chaos/model/history.py has it.
-- $1 run ids
SELECT key, result_id::text AS run FROM session.idempotency WHERE scope = 'run' AND result_id = ANY($1::uuid[]);

-- name: left
-- As tests/chaos/model/history.py has it.
-- $1 session ids, $2 their run ids
SELECT session_id::text AS session, 'session' AS what, count(*)::integer AS rows
FROM session.session WHERE session_id = ANY($1::uuid[]) GROUP BY 1
UNION ALL SELECT session_id::text, 'run', count(*)::integer
FROM session.run WHERE session_id = ANY($1::uuid[]) GROUP BY 1
UNION ALL SELECT session_id::text, 'message', count(*)::integer
FROM session.message WHERE session_id = ANY($1::uuid[]) GROUP BY 1
UNION ALL SELECT session_id::text, 'lease', count(*)::integer
FROM session.lease WHERE session_id = ANY($1::uuid[]) GROUP BY 1
UNION ALL SELECT session_id::text, 'tool_call', count(*)::integer
FROM session.tool_call WHERE session_id = ANY($1::uuid[]) GROUP BY 1
UNION ALL SELECT run_id::text, 'event', count(*)::integer
FROM session.event WHERE run_id = ANY($2::uuid[]) GROUP BY 1;

-- name: late_calls
-- As tests/chaos/model/history.py has it.
-- $1 session ids
SELECT extract(epoch FROM at)::float AS t, session::text, call, run::text
FROM chaos.calls WHERE session = ANY($1::uuid[]) AND new = 2 ORDER BY n;
