-- What must not wait for one row that somebody holds, and what has to wait for a standby.

-- Makes its transaction one that waits for the synchronous standby, whatever else it does or does not do: for answers
-- of the form "that was done before". What was done before may be in this server alone: a wait that was cancelled,
-- and a crash, leave commits that no standby has. Returns whether there is anything to wait for.
CREATE FUNCTION session.confirm() RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('synchronous_standby_names') = '' THEN
        RETURN false;
    END IF;
    -- Nothing of it is stored; its record in the log comes after all that it confirms.
    PERFORM pg_logical_emit_message(true, 'hermesh', '');
    RETURN true;
END $$;

-- A step waits for its session's lease in a place that other runs' steps need.
ALTER FUNCTION session.append_step(uuid, uuid, bigint, integer, text[], bigint[], text[], json, json, smallint,
                                   json, integer, integer, integer) SET lock_timeout = '200ms';

-- Ends runs that nobody holds and that are cancelled or late; returns how many. One whose rows somebody has locked
-- is left to a later call: it must keep none of the others.
CREATE OR REPLACE FUNCTION session.end_orphans(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '50ms' AS $$
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
        WHERE l.owner IS NULL OR NOT session.in_force(l.lease_until)
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
