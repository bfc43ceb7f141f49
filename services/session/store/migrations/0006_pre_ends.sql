-- How runs end: what was accepted stays in the conversation, and a run whose agent cannot write its end is ended
-- here. As in 0003: lock order lease, session, run, tool_call.

-- Makes a run's input part of the conversation, after everything that is there. The caller holds the lease row.
CREATE FUNCTION session.join_input(p_run uuid) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_run session.run%ROWTYPE;
    v_count integer;
BEGIN
    SELECT * INTO STRICT v_run FROM session.run WHERE run_id = p_run;
    UPDATE session.session SET message_count = message_count + json_array_length(v_run.input)
    WHERE session_id = v_run.session_id
    RETURNING message_count - json_array_length(v_run.input) INTO STRICT v_count;
    UPDATE session.run SET input = NULL, first_message = v_count + 1 WHERE run_id = p_run;
    INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content, tool_calls,
                                 tool_call_id, created_ms)
    SELECT v_run.session_id, (m.value ->> 0)::uuid, v_run.tenant_id, p_run, v_count + m.place, m.value ->> 1,
           m.value ->> 2, '', '', v_run.created_ms
    FROM json_array_elements(v_run.input) WITH ORDINALITY m(value, place);
END $$;

-- Ends a run. The caller holds the session's lease row. Drops the run's messages from the conversation if
-- that was asked for, frees the lease if the run has it, and makes the session's next run due. A call that must
-- not run twice and was begun may have acted: nobody is left to say so, and its tool's late word settles it.
-- A run that ends before its turn keeps its input until then: the end of the run before it, be it its own, brings
-- it into the conversation. So what was accepted is there, in order, unless it was rolled back.
CREATE OR REPLACE FUNCTION session.finish_run(p_run uuid, p_status smallint, p_last_seq integer, p_error json)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_session uuid;
    v_ordinal integer;
    v_rollback boolean;
    v_first integer;
    v_next session.run%ROWTYPE;
    v_ended uuid;
    v_count integer := 0;
BEGIN
    UPDATE session.run SET status = p_status, last_seq = p_last_seq, error = p_error,
           input = CASE WHEN rollback THEN NULL ELSE input END,
           finished_ms = session.now_ms(), dispatch_after = NULL
    WHERE run_id = p_run
    RETURNING session_id, ordinal, rollback, first_message INTO v_session, v_ordinal, v_rollback, v_first;
    IF v_rollback THEN
        UPDATE session.message SET rolled_back = true
        WHERE session_id = v_session AND ordinal >= v_first AND run_id = p_run AND NOT rolled_back;
        GET DIAGNOSTICS v_count = ROW_COUNT;
    END IF;
    UPDATE session.session SET message_count = message_count - v_count,
           updated_ms = greatest(updated_ms, session.now_ms())
    WHERE session_id = v_session;
    UPDATE session.lease SET owner = NULL, lease_until = NULL WHERE session_id = v_session AND run_id = p_run;
    UPDATE session.tool_call SET state = 5 WHERE run_id = p_run AND state = 2 AND effect = 3;
    SELECT * INTO v_next FROM session.run r
    WHERE r.session_id = v_session AND r.status < 4 ORDER BY r.ordinal LIMIT 1;
    IF v_next.ordinal IS NULL OR v_next.ordinal > v_ordinal THEN
        FOR v_ended IN SELECT r.run_id FROM session.run r
                       WHERE r.session_id = v_session AND r.ordinal >= v_ordinal
                         AND (v_next.ordinal IS NULL OR r.ordinal < v_next.ordinal) AND r.input IS NOT NULL
                       ORDER BY r.ordinal LOOP
            PERFORM session.join_input(v_ended);
        END LOOP;
    END IF;
    IF v_next.run_id IS NOT NULL THEN
        UPDATE session.run SET dispatch_after = clock_timestamp()
        WHERE run_id = v_next.run_id AND status = 1 AND dispatch_after IS NULL;
        IF FOUND THEN
            PERFORM pg_notify('hermesh_due', v_session::text);
        END IF;
    END IF;
END $$;

-- Ends a run whose holder cannot write its end: as cancelled if it shall be, else as failed, and not to be tried
-- again as it was. The fence is the holder's, as in begin_tool_call; it writes nothing more. Returns the run, or
-- nothing when the fence is not good: then the run has ended, waits for a person, or is another's.
CREATE FUNCTION session.fail_held(p_session uuid, p_run uuid, p_fence bigint, p_message text)
RETURNS SETOF session.run_view LANGUAGE plpgsql AS $$
DECLARE
    v_lease session.lease%ROWTYPE;
    v_run session.run%ROWTYPE;
    v_error json := json_build_object('code', 'INTERNAL', 'reason', 'INTERNAL', 'message', p_message,
                                      'retryable', false);
    v_seq integer;
BEGIN
    SELECT * INTO v_lease FROM session.lease WHERE session_id = p_session FOR NO KEY UPDATE;
    SELECT * INTO v_run FROM session.run WHERE run_id = p_run AND session_id = p_session FOR NO KEY UPDATE;
    IF v_lease.owner IS NULL OR v_lease.run_id <> p_run OR v_run.status IS DISTINCT FROM 2
       OR p_fence NOT BETWEEN v_lease.fence - v_lease.attach AND v_lease.fence THEN
        RETURN;
    END IF;
    PERFORM session.say_resolved(p_run);
    IF v_run.cancel_requested THEN
        PERFORM session.cancel_unheld(p_run);
    ELSE
        v_seq := session.write_unheld(p_run, ARRAY['run.failed'], ARRAY[session.now_ms()],
            ARRAY['{"code":"INTERNAL","reason":"INTERNAL","message":' || to_json(p_message)::text
                  || ',"retryable":false}']);
        PERFORM session.finish_run(p_run, 5::smallint, v_seq, v_error);
    END IF;
    RETURN QUERY SELECT * FROM session.run_view v WHERE v.run_id = p_run;
END $$;

-- Stores what a begun call did. The fence must be the one it was begun under, current or not: what was done
-- was done. The first outcome stays, but a late word settles an unknown call, and one that was to run again and
-- was not begun yet. Of a call that must not run twice only its last try's word counts (p_tries, 0: not said).
-- Looked at again when it was unknown: a person may have let it run again just then, and the word still counts.
CREATE OR REPLACE FUNCTION session.complete_tool_call(p_call text, p_fence bigint, p_state smallint,
                                                      p_content text, p_ref text, p_tries integer)
RETURNS SETOF session.tool_call
LANGUAGE plpgsql AS $$
BEGIN
    FOR v_look IN 1 .. 2 LOOP
        UPDATE session.tool_call t SET state = p_state, content = p_content, content_ref = p_ref
        WHERE t.call_id = p_call AND t.fence = p_fence
          AND ((t.state = 2 AND (t.effect < 3 OR p_tries IN (0, t.tries)))
               OR (t.state = 1 AND p_state IN (3, 4) AND p_tries > 0 AND p_tries = t.tries));
        EXIT WHEN FOUND OR NOT EXISTS (SELECT FROM session.tool_call t
                                       WHERE t.call_id = p_call AND t.state = 5 AND t.fence = p_fence);
        PERFORM session.settle_tool_call(p_call, p_state, p_content, p_ref, p_tries);
    END LOOP;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
END $$;
