-- A context without the conversation's history, for callers that have it in a cache: with p_max_messages = 0
-- it holds the run's own messages and the one before them, whose id and ordinal tell which history fits.
CREATE OR REPLACE FUNCTION session.run_context(p_run uuid, p_max_messages integer, p_max_bytes bigint) RETURNS json
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_session session.session%ROWTYPE;
    v_attempt integer;
    v_messages json;
    v_kept integer;
    v_events json;
    v_calls json;
    v_step integer;
    v_before integer;
BEGIN
    SELECT s.* INTO STRICT v_session FROM session.session s JOIN session.run r USING (session_id)
    WHERE r.run_id = p_run;
    SELECT attempt INTO STRICT v_attempt FROM session.run WHERE run_id = p_run;
    IF p_max_messages = 0 THEN
        SELECT m.ordinal INTO v_before FROM session.message m
        WHERE m.session_id = v_session.session_id AND NOT m.rolled_back AND m.run_id <> p_run
        ORDER BY m.ordinal DESC LIMIT 1;
        SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                         created_ms) ORDER BY ordinal), count(*)
        INTO v_messages, v_kept
        FROM session.message
        WHERE session_id = v_session.session_id AND NOT rolled_back AND ordinal >= coalesce(v_before, 0);
    ELSE
        WITH newest AS (
            SELECT m.*, row_number() OVER later AS place,
                   sum(octet_length(content) + octet_length(tool_calls)) OVER later AS bytes
            FROM (SELECT * FROM session.message
                  WHERE session_id = v_session.session_id AND NOT rolled_back
                  ORDER BY ordinal DESC LIMIT greatest(p_max_messages, 1000)) m
            WINDOW later AS (ORDER BY ordinal DESC)
        )
        SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                         created_ms) ORDER BY ordinal), count(*)
        INTO v_messages, v_kept
        FROM newest
        WHERE run_id = p_run OR place = 1 OR (place <= p_max_messages AND bytes <= p_max_bytes);
    END IF;
    -- Before its first claim a run has nothing but run.created.
    IF v_attempt > 1 THEN
        SELECT seq INTO v_step FROM session.event WHERE run_id = p_run AND type = 'step.started'
        ORDER BY seq DESC LIMIT 1;
        SELECT json_agg(json_build_array(seq, type, time_ms, data) ORDER BY seq) INTO v_events
        FROM session.event WHERE run_id = p_run AND seq >= coalesce(v_step, 2);
        SELECT json_agg(json_build_array(call_id, name, arguments, effect, state, content, content_ref,
                                         idempotency_key, fence) ORDER BY position) INTO v_calls
        FROM session.tool_call WHERE run_id = p_run;
    END IF;
    RETURN json_build_object('messages', v_messages, 'events', v_events, 'tool_calls', v_calls,
                             'user', v_session.user_name, 'agent', v_session.agent,
                             'omitted', v_session.message_count - v_kept);
END $$;
