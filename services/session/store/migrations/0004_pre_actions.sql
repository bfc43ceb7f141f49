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
        IF v_lease.run_id = p_run AND v_lease.owner IS NOT NULL AND session.in_force(v_lease.lease_until) THEN
            PERFORM pg_notify('hermesh_cancel', p_run::text);
        ELSE
            v_seq := session.cancel_unheld(p_run);
        END IF;
    END IF;
    RETURN QUERY SELECT v, e.seq, e.time_ms, e.data
    FROM session.run_view v LEFT JOIN session.event e ON e.run_id = p_run AND e.seq = v_seq
    WHERE v.run_id = p_run;
END $$;

-- Lets a run that waited for a person go on, and its time with it, once none of its calls waits. The caller
-- holds the lease row.
CREATE FUNCTION session.requeue_run(p_run uuid) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_session uuid;
BEGIN
    UPDATE session.run SET status = 1, idle_claims = 0, dispatch_after = clock_timestamp(),
           deadline = clock_timestamp() + left_ms * interval '1 ms'
    WHERE run_id = p_run AND status = 3
      AND NOT EXISTS (SELECT FROM session.tool_call t
                      WHERE t.run_id = p_run AND session.call_waits(t.state, t.needs_approval))
    RETURNING session_id INTO v_session;
    IF FOUND THEN
        PERFORM pg_notify('hermesh_due', v_session::text);
    END IF;
END $$;

-- Marks a call as running if the fence is of the current claim and it may run, or run again. Outcomes are
-- BeginOutcome's: 1 go, 2 done before, 3 unknown and not to be repeated, 4 fenced, 5 not approved. A re-attach
-- raises the fence of the same holder, so fences since the claim (fence - attach) are good. This try acts for
-- p_act at most.
CREATE FUNCTION session.begin_tool_call(p_call text, p_session uuid, p_fence bigint, p_act interval)
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
    IF v_outcome = 1 THEN
        UPDATE session.tool_call t SET state = 2, fence = p_fence, tries = t.tries + 1,
               quiet_at = greatest(t.quiet_at, clock_timestamp() + p_act)
        WHERE t.call_id = p_call RETURNING * INTO v_call;
    ELSIF v_outcome = 3 AND v_call.state = 2 THEN
        UPDATE session.tool_call t SET state = 5 WHERE t.call_id = p_call RETURNING * INTO v_call;
    END IF;
    RETURN QUERY SELECT v_outcome, v_call;
END $$;

-- Stores what became of an unknown call, and lets its run go on if that was the last thing it waited for:
-- 3 completed, 4 failed, 1 not done, so that it may run. p_tries is how often it had been begun when that was
-- found out (0: not said): what was found counts for no later try. Not done counts only once no try can act
-- any more: what looks before that may look too early. Any other call is left as it is.
CREATE FUNCTION session.settle_tool_call(p_call text, p_state smallint, p_content text, p_ref text,
                                         p_tries integer)
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
    WHERE t.call_id = p_call AND t.state = 5
      AND ((p_state IN (3, 4) AND p_tries IN (0, t.tries))
           OR (p_state = 1 AND p_tries = t.tries AND t.quiet_at <= clock_timestamp()));
    IF FOUND AND v_status = 3 THEN
        PERFORM session.write_unheld(v_run, ARRAY['action.resolved'], ARRAY[session.now_ms()],
            ARRAY['{"call_id":' || to_json(p_call)::text || ',"decision":"'
                  || CASE p_state WHEN 3 THEN 'completed' WHEN 4 THEN 'failed' ELSE 'retry' END || '"}']);
        PERFORM session.requeue_run(v_run);
    END IF;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
END $$;

-- Stores what a begun call did. The fence must be the one it was begun under, current or not: what was done
-- was done. The first outcome stays, but a late word settles an unknown call, and one that was to run again and
-- was not begun yet. Of a call that must not run twice only its last try's word counts (p_tries, 0: not said).
CREATE FUNCTION session.complete_tool_call(p_call text, p_fence bigint, p_state smallint, p_content text,
                                           p_ref text, p_tries integer)
RETURNS SETOF session.tool_call
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE session.tool_call t SET state = p_state, content = p_content, content_ref = p_ref
    WHERE t.call_id = p_call AND t.fence = p_fence
      AND ((t.state = 2 AND (t.effect < 3 OR p_tries IN (0, t.tries)))
           OR (t.state = 1 AND p_state IN (3, 4) AND p_tries > 0 AND p_tries = t.tries));
    IF NOT FOUND AND EXISTS (SELECT FROM session.tool_call t
                             WHERE t.call_id = p_call AND t.state = 5 AND t.fence = p_fence) THEN
        RETURN QUERY
        SELECT * FROM session.settle_tool_call(p_call, p_state, p_content, p_ref, p_tries);
        RETURN;
    END IF;
    RETURN QUERY SELECT * FROM session.tool_call t WHERE t.call_id = p_call;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'TOOL_CALL_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
END $$;

-- Settles a call that waits for a person, on that person's word (ActionDecision: 1 completed, 2 failed, 3 retry,
-- 4 abandon, 5 approve, 6 deny), and writes the event that says so. The run goes on once none of its calls waits.
-- A call that needs approval may be decided while its run goes on with others: the log hears of it later.
-- A request id that was used before for the same word changes nothing.
CREATE FUNCTION session.resolve_action(p_tenant uuid, p_run uuid, p_call text, p_decision integer,
                                       p_content text, p_request_id text, p_fingerprint bytea,
                                       p_time_ms bigint, p_data text)
RETURNS TABLE (run session.run_view, call session.tool_call)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_known bytea;
    v_repeated boolean := false;
    v_session uuid;
    v_status smallint;
    v_call session.tool_call%ROWTYPE;
    v_approval boolean;
    v_state smallint;
BEGIN
    IF p_request_id <> '' THEN
        -- Waits for another call with the same id that is under way.
        INSERT INTO session.idempotency (tenant_id, scope, key, fingerprint, result_id)
        VALUES (p_tenant, 'action', p_request_id, p_fingerprint, p_run)
        ON CONFLICT (tenant_id, scope, key) DO NOTHING;
        v_repeated := NOT FOUND;
        IF v_repeated THEN
            SELECT i.fingerprint INTO v_known FROM session.idempotency i
            WHERE i.tenant_id = p_tenant AND i.scope = 'action' AND i.key = p_request_id;
            IF v_known IS DISTINCT FROM p_fingerprint THEN
                RAISE EXCEPTION 'REQUEST_ID_REUSED' USING ERRCODE = 'HM409';
            END IF;
        END IF;
    END IF;
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
    v_approval := v_call.state = 1 AND v_call.needs_approval;
    v_state := CASE WHEN p_decision = 1 THEN 3 WHEN p_decision IN (2, 6) THEN 4
                    WHEN p_decision IN (3, 5) THEN 1 ELSE v_call.state END;
    IF v_repeated THEN
        NULL;
    ELSIF (v_approval AND v_status < 4) OR (v_call.state = 5 AND v_status = 3 AND p_decision < 5) THEN
        UPDATE session.tool_call t SET state = v_state, needs_approval = v_approval AND p_decision = 4,
               content = CASE WHEN v_state IN (3, 4) THEN p_content ELSE t.content END,
               unsaid = CASE WHEN v_status = 3 OR p_decision = 4 THEN '' ELSE p_data END, unsaid_ms = p_time_ms
        WHERE t.call_id = p_call;
        IF v_status = 3 THEN
            PERFORM session.write_unheld(p_run, ARRAY['action.resolved'], ARRAY[p_time_ms], ARRAY[p_data]);
        END IF;
        IF p_decision = 4 THEN
            PERFORM session.cancel_run(p_tenant, p_run, coalesce(nullif(p_content, ''), 'abandoned'));
        ELSE
            PERFORM session.requeue_run(p_run);
        END IF;
    ELSIF NOT (p_decision IN (1, 2, 6) AND v_call.state = v_state AND v_call.content = p_content) THEN
        -- The same word again changes nothing; another one comes too late.
        RAISE EXCEPTION 'ACTION_NOT_REQUIRED' USING ERRCODE = 'HM412';
    END IF;
    RETURN QUERY SELECT v, t FROM session.run_view v, session.tool_call t
    WHERE v.run_id = p_run AND t.call_id = p_call;
END $$;
