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
