-- A tenant that is on its way to another cell, or was moved there, changes nothing here any more.
--
-- The row of session.tenant_move is the freeze. It is looked at by the transaction that changes something, in the
-- moment of the change, so that no replica has to hear of it first. What it cannot reach is what was under way: whoever
-- freezes waits for the transactions that had a lock on these tables by then, and takes all leases under a new fence
-- after that. From there on an append fails by its fence as after any takeover; appends, which touch only lease and
-- event, pay nothing for all this.

CREATE TABLE session.tenant_move (
    tenant_id uuid PRIMARY KEY,
    -- 1: leaving, 2: arriving, 3: moved away.
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 3),
    cell text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE session.tenant_move IS 'tenants that may not be changed here: on their way between cells, or gone';
COMMENT ON COLUMN session.tenant_move.state IS '1: leaving, 2: arriving, 3: moved away';
COMMENT ON COLUMN session.tenant_move.cell IS 'the other cell';

-- VOLATILE: its look at tenant_move is as of now and not as of the statement that fired it. Whoever moves the tenant
-- names it in hermesh.moving, for a transaction.
CREATE FUNCTION session.refuse_while_moving() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    v_tenant uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.tenant_id ELSE NEW.tenant_id END;
    v_state smallint;
BEGIN
    SELECT m.state INTO v_state FROM session.tenant_move m WHERE m.tenant_id = v_tenant;
    IF v_state IS NOT NULL AND current_setting('hermesh.moving', true) IS DISTINCT FROM v_tenant::text THEN
        RAISE EXCEPTION '%', CASE v_state WHEN 3 THEN 'TENANT_MOVED' ELSE 'TENANT_MOVING' END
        USING ERRCODE = 'HM503';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.session
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.run
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.message
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.tool_call
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.idempotency
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.tenant
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON session.api_key
FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

-- As before, for tenants that are here.
CREATE OR REPLACE FUNCTION session.end_orphans(p_limit integer) RETURNS integer
    LANGUAGE plpgsql
    SET lock_timeout TO '50ms'
    AS $$
DECLARE
    v_found record;
    v_lease session.lease%ROWTYPE;
    v_ended integer := 0;
    v_locked integer := 0;
BEGIN
    FOR v_found IN
        -- now() and not clock_timestamp(), so that the index serves.
        SELECT o.session_id, o.run_id
        FROM (SELECT r.session_id, r.run_id FROM session.run r
              WHERE r.status IN (1, 2) AND r.deadline IS NOT NULL AND r.deadline <= now()
              UNION
              SELECT r.session_id, r.run_id FROM session.run r
              WHERE r.status IN (1, 2) AND r.cancel_requested) o
        JOIN session.lease l USING (session_id)
        WHERE (l.owner IS NULL OR NOT session.in_force(l.lease_until))
          AND l.tenant_id <> ALL (ARRAY(SELECT m.tenant_id FROM session.tenant_move m))
        ORDER BY o.session_id LIMIT p_limit
    LOOP
        SELECT * INTO v_lease FROM session.lease l WHERE l.session_id = v_found.session_id
        FOR NO KEY UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND OR (v_lease.owner IS NOT NULL AND session.in_force(v_lease.lease_until));
        BEGIN
            PERFORM FROM session.run r WHERE r.run_id = v_found.run_id AND r.status IN (1, 2)
            FOR NO KEY UPDATE SKIP LOCKED;
            IF FOUND AND session.end_if_due(v_found.run_id) THEN
                v_ended := v_ended + 1;
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            v_locked := v_locked + 1;
            EXIT WHEN v_locked >= 8;
        END;
    END LOOP;
    RETURN v_ended;
END $$;
