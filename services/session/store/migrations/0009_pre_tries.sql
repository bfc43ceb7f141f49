-- Of a call that may run again several tries may act at once: that a later one has ended says nothing of an earlier.

ALTER TABLE session.tool_call ADD COLUMN ended_ahead integer[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN session.tool_call.ended_try IS 'the last try up to which all are known to have ended, whatever came of them';
COMMENT ON COLUMN session.tool_call.ended_ahead IS 'later tries that are known to have ended';

-- Stores what a try did (see complete_tool_call), and that it has ended, unless it still acts: one that did not
-- stop when it was told to.
CREATE OR REPLACE FUNCTION session.end_try(p_call text, p_fence bigint, p_state smallint, p_content text,
                                           p_ref text, p_tries integer, p_acts boolean)
RETURNS SETOF session.tool_call
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM session.complete_tool_call(p_call, p_fence, p_state, p_content, p_ref, p_tries);
    IF NOT p_acts THEN
        UPDATE session.tool_call t SET (ended_try, ended_ahead) = (
            SELECT e.upto, ARRAY(SELECT a FROM unnest(t.ended_ahead || p_tries) a WHERE a > e.upto)
            FROM (SELECT min(n) - 1 AS upto FROM generate_series(t.ended_try + 1, t.tries + 1) n
                  WHERE n <> ALL (t.ended_ahead || p_tries)) e)
        WHERE t.call_id = p_call AND p_tries > t.ended_try AND p_tries <= t.tries
          AND p_tries <> ALL (t.ended_ahead);
    END IF;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
END $$;

-- As before; but of a call of a cancelled run that was begun before nobody says that it was not.
CREATE OR REPLACE FUNCTION session.begin_tool_call(p_call text, p_session uuid, p_fence bigint, p_act interval)
RETURNS TABLE (outcome smallint, call session.tool_call)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_lease session.lease%ROWTYPE;
    v_call session.tool_call%ROWTYPE;
    v_outcome smallint;
BEGIN
    -- A takeover that raises the fence waits for this row, so it sees the call either as intended or as running.
    SELECT * INTO v_lease FROM session.lease l WHERE l.session_id = p_session FOR NO KEY UPDATE;
    SELECT * INTO v_call FROM session.tool_call t
    WHERE t.call_id = p_call AND t.session_id = p_session FOR NO KEY UPDATE;
    IF v_call.call_id IS NULL THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    v_outcome := CASE
        WHEN v_lease.owner IS NULL OR v_lease.run_id <> v_call.run_id
             OR p_fence NOT BETWEEN v_lease.fence - v_lease.attach AND v_lease.fence THEN 4
        WHEN v_call.state IN (3, 4) THEN 2
        WHEN v_call.state = 5 OR (v_call.state = 2 AND v_call.effect = 3) THEN 3
        WHEN v_call.state = 1 AND v_call.needs_approval THEN 5
        ELSE 1 END;
    IF v_outcome = 1 AND EXISTS (SELECT FROM session.run r WHERE r.run_id = v_call.run_id AND r.cancel_requested)
    THEN
        v_outcome := 2;
        UPDATE session.tool_call t SET state = 4, content = 'The run was cancelled; the call was not begun'
               || CASE WHEN t.tries = 0 THEN '.' ELSE ' again. What came of the try before is not known.' END
        WHERE t.call_id = p_call RETURNING * INTO v_call;
    ELSIF v_outcome = 1 THEN
        UPDATE session.tool_call t SET state = 2, fence = p_fence, tries = t.tries + 1,
               quiet_at = greatest(t.quiet_at, clock_timestamp() + p_act)
        WHERE t.call_id = p_call RETURNING * INTO v_call;
    ELSIF v_outcome = 3 AND v_call.state = 2 THEN
        UPDATE session.tool_call t SET state = 5 WHERE t.call_id = p_call RETURNING * INTO v_call;
    END IF;
    RETURN QUERY SELECT v_outcome, v_call;
END $$;
