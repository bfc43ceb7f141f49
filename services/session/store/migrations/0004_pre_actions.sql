-- Cancelling, and the tool journal. As in 0003: lock order lease, session, run, tool_call; refusals raise HM.

-- Asks for a run to be cancelled. One that nobody holds ends here, and its terminal event is returned; the
-- holder of any other is told by hermesh_cancel.
CREATE FUNCTION session.cancel_run(p_tenant uuid, p_run uuid, p_reason text)
RETURNS TABLE (run session.run_view, event_seq integer, event_time_ms bigint, event_data text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_session uuid;
    v_lease session.lease%ROWTYPE;
    v_run session.run%ROWTYPE;
    v_seq integer;
BEGIN
    SELECT r.session_id INTO v_session FROM session.run r WHERE r.run_id = p_run AND r.tenant_id = p_tenant;
    SELECT * INTO v_lease FROM session.lease l WHERE l.session_id = v_session FOR NO KEY UPDATE;
    SELECT * INTO v_run FROM session.run r WHERE r.run_id = p_run AND r.tenant_id = p_tenant FOR NO KEY UPDATE;
    IF v_run.run_id IS NULL OR v_lease.session_id IS NULL THEN
        RAISE EXCEPTION 'RUN_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    IF v_run.status < 4 THEN
        PERFORM session.request_cancel(p_run, p_reason);
        IF v_lease.run_id = p_run AND v_lease.owner IS NOT NULL AND v_lease.lease_until >= clock_timestamp() THEN
            PERFORM pg_notify('hermesh_cancel', p_run::text);
        ELSE
            v_seq := session.cancel_unheld(p_run);
        END IF;
    END IF;
    RETURN QUERY SELECT v, e.seq, e.time_ms, e.data
    FROM session.run_view v LEFT JOIN session.event e ON e.run_id = p_run AND e.seq = v_seq
    WHERE v.run_id = p_run;
END $$;

-- Lets a run that waited for a person go on, and its time with it. The caller holds the lease row.
CREATE FUNCTION session.requeue_run(p_run uuid) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_session uuid;
BEGIN
    UPDATE session.run SET status = 1, idle_claims = 0, dispatch_after = clock_timestamp(),
           deadline = clock_timestamp() + left_ms * interval '1 ms'
    WHERE run_id = p_run AND status = 3
    RETURNING session_id INTO v_session;
    IF FOUND THEN
        PERFORM pg_notify('hermesh_due', v_session::text);
    END IF;
END $$;

-- Marks a call as running if the fence is of the current claim and it may run, or run again. Outcomes are
-- BeginOutcome's: 1 go, 2 done before, 3 unknown and not to be repeated, 4 fenced. A re-attach raises the
-- fence of the same holder, so fences since the claim (fence - attach) are good.
CREATE FUNCTION session.begin_tool_call(p_call text, p_session uuid, p_fence bigint)
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
        ELSE 1 END;
    IF v_outcome = 1 THEN
        UPDATE session.tool_call t SET state = 2, fence = p_fence WHERE t.call_id = p_call RETURNING * INTO v_call;
    ELSIF v_outcome = 3 AND v_call.state = 2 THEN
        UPDATE session.tool_call t SET state = 5 WHERE t.call_id = p_call RETURNING * INTO v_call;
    END IF;
    RETURN QUERY SELECT v_outcome, v_call;
END $$;

-- Stores the outcome of an unknown call, and lets its run go on if that was the last thing it waited for.
-- Any other call is left as it is.
CREATE FUNCTION session.settle_tool_call(p_call text, p_state smallint, p_content text, p_ref text)
RETURNS SETOF session.tool_call
LANGUAGE plpgsql AS $$
DECLARE
    v_session uuid;
    v_run uuid;
    v_status smallint;
BEGIN
    SELECT t.session_id, t.run_id INTO v_session, v_run FROM session.tool_call t WHERE t.call_id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    PERFORM FROM session.lease l WHERE l.session_id = v_session FOR NO KEY UPDATE;
    SELECT r.status INTO v_status FROM session.run r WHERE r.run_id = v_run FOR NO KEY UPDATE;
    UPDATE session.tool_call t SET state = p_state, content = p_content, content_ref = p_ref
    WHERE t.call_id = p_call AND t.state = 5 AND p_state IN (3, 4);
    IF FOUND AND v_status = 3
       AND NOT EXISTS (SELECT FROM session.tool_call t WHERE t.run_id = v_run AND t.state = 5) THEN
        PERFORM session.write_unheld(v_run, ARRAY['action.resolved'], ARRAY[session.now_ms()],
            ARRAY['{"call_id":' || to_json(p_call)::text || ',"decision":"'
                  || CASE p_state WHEN 3 THEN 'completed' ELSE 'failed' END || '"}']);
        PERFORM session.requeue_run(v_run);
    END IF;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
END $$;

-- Stores what a begun call did. The fence must be the one it was begun under, current or not: what was done
-- was done. The first outcome stays, but a late word settles an unknown call.
CREATE FUNCTION session.complete_tool_call(p_call text, p_fence bigint, p_state smallint, p_content text,
                                           p_ref text)
RETURNS SETOF session.tool_call
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE session.tool_call t SET state = p_state, content = p_content, content_ref = p_ref
    WHERE t.call_id = p_call AND t.state = 2 AND t.fence = p_fence;
    IF NOT FOUND AND EXISTS (SELECT FROM session.tool_call t
                             WHERE t.call_id = p_call AND t.state = 5 AND t.fence = p_fence) THEN
        RETURN QUERY SELECT * FROM session.settle_tool_call(p_call, p_state, p_content, p_ref);
        RETURN;
    END IF;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
END $$;

-- Settles a call that its run waits for, on a person's word (ActionDecision: 1 completed, 2 failed, 3 retry,
-- 4 abandon), and writes the events that say so. The run goes on once no other call of it is unknown.
CREATE FUNCTION session.resolve_action(p_tenant uuid, p_run uuid, p_call text, p_decision integer,
                                       p_content text, p_types text[], p_times bigint[], p_data text[])
RETURNS TABLE (run session.run_view, call session.tool_call)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_session uuid;
    v_status smallint;
    v_call session.tool_call%ROWTYPE;
    v_state smallint;
BEGIN
    SELECT r.session_id INTO v_session FROM session.run r WHERE r.run_id = p_run AND r.tenant_id = p_tenant;
    PERFORM FROM session.lease l WHERE l.session_id = v_session FOR NO KEY UPDATE;
    SELECT r.status INTO v_status FROM session.run r WHERE r.run_id = p_run AND r.tenant_id = p_tenant
    FOR NO KEY UPDATE;
    IF v_status IS NULL THEN
        RAISE EXCEPTION 'RUN_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    SELECT * INTO v_call FROM session.tool_call t
    WHERE t.call_id = p_call AND t.run_id = p_run AND t.tenant_id = p_tenant FOR NO KEY UPDATE;
    IF v_call.call_id IS NULL THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    v_state := CASE p_decision WHEN 1 THEN 3 WHEN 2 THEN 4 WHEN 3 THEN 1 ELSE v_call.state END;
    IF v_status = 3 AND v_call.state IN (1, 5) THEN
        UPDATE session.tool_call t SET state = v_state,
               content = CASE WHEN p_decision IN (1, 2) THEN p_content ELSE t.content END
        WHERE t.call_id = p_call;
        PERFORM session.write_unheld(p_run, p_types, p_times, p_data);
        IF p_decision = 4 THEN
            PERFORM session.request_cancel(p_run, coalesce(nullif(p_content, ''), 'abandoned'));
            PERFORM session.cancel_unheld(p_run);
        ELSIF NOT EXISTS (SELECT FROM session.tool_call t WHERE t.run_id = p_run AND t.state = 5) THEN
            PERFORM session.requeue_run(p_run);
        END IF;
    ELSIF NOT (p_decision IN (1, 2) AND v_call.state = v_state AND v_call.content = p_content) THEN
        -- The same word again changes nothing; another one comes too late.
        RAISE EXCEPTION 'ACTION_NOT_REQUIRED' USING ERRCODE = 'HM412';
    END IF;
    RETURN QUERY SELECT v, t FROM session.run_view v, session.tool_call t
    WHERE v.run_id = p_run AND t.call_id = p_call;
END $$;
