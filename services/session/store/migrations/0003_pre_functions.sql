-- Changes of more than one row that belong together, each as one function: one round trip, one transaction,
-- and no transaction left open by a client that died. Refusals that undo the call are raised with a SQLSTATE
-- of class HM, whose message is an ErrorReason.

-- Whether a lease that lasts until then is one that lasts now. No lease is given for longer than some seconds: one
-- that says so was given by a clock that has gone back since, and would keep its session for as long as it had
-- been ahead.
CREATE FUNCTION session.in_force(p_until timestamptz) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN p_until >= clock_timestamp() AND p_until <= clock_timestamp() + interval '1 minute';

-- Ends a run. The caller holds the session's lease row. Drops the run's messages from the conversation if
-- that was asked for, frees the lease if the run has it, and makes the session's next run due. A call that must
-- not run twice and was begun may have acted: nobody is left to say so, and its tool's late word settles it.
CREATE FUNCTION session.finish_run(p_run uuid, p_status smallint, p_last_seq integer, p_error json)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_session uuid;
    v_rollback boolean;
    v_first integer;
    v_next uuid;
    v_count integer := 0;
BEGIN
    UPDATE session.run SET status = p_status, last_seq = p_last_seq, error = p_error, input = NULL,
           finished_ms = session.now_ms(), dispatch_after = NULL
    WHERE run_id = p_run
    RETURNING session_id, rollback, first_message INTO v_session, v_rollback, v_first;
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
    SELECT r.run_id INTO v_next FROM session.run r
    WHERE r.session_id = v_session AND r.status < 4 ORDER BY r.ordinal LIMIT 1;
    IF v_next IS NOT NULL THEN
        UPDATE session.run SET dispatch_after = clock_timestamp()
        WHERE run_id = v_next AND status = 1 AND dispatch_after IS NULL;
        IF FOUND THEN
            PERFORM pg_notify('hermesh_due', v_session::text);
        END IF;
    END IF;
END $$;

-- The seq that a run's next event must have, whatever became of its lease. The caller holds the lease row.
CREATE FUNCTION session.next_seq(p_run uuid) RETURNS integer
    LANGUAGE sql STABLE
    RETURN (SELECT 1 + greatest(v.last_seq, (SELECT max(e.seq) FROM session.event e WHERE e.run_id = p_run))
            FROM session.run_view v WHERE v.run_id = p_run);

-- Writes events of the store's own to a run that nobody holds; a writer that thinks it does is fenced off.
-- The caller holds the lease row. Returns the run's last seq.
-- Tells every replica: events that no writer sent come to watchers at once only if somebody says so. Rare
-- (cancels, lost runs, a person's word), so that NOTIFY stays off the hot path.
CREATE FUNCTION session.write_unheld(p_run uuid, p_types text[], p_times bigint[], p_data text[])
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    v_run session.run%ROWTYPE;
    v_seq integer := session.next_seq(p_run);
    v_fence bigint;
BEGIN
    SELECT * INTO STRICT v_run FROM session.run WHERE run_id = p_run;
    -- The lease may be another run's: a queued run that is cancelled leaves it alone.
    UPDATE session.lease SET fence = fence + 1, attach = 0, run_id = p_run, owner = NULL, lease_until = NULL,
           next_seq = v_seq + cardinality(p_types)
    WHERE session_id = v_run.session_id
      AND (run_id = p_run OR run_id IS NULL
           OR NOT EXISTS (SELECT FROM session.run o WHERE o.run_id = lease.run_id AND o.status < 4));
    SELECT fence INTO STRICT v_fence FROM session.lease WHERE session_id = v_run.session_id;
    INSERT INTO session.event (run_id, seq, time_ms, tenant_id, session_id, fence, type, data)
    SELECT p_run, v_seq + c.i::integer - 1, c.time_ms, v_run.tenant_id, v_run.session_id, v_fence, c.type, c.data
    FROM unnest(p_types, p_times, p_data) WITH ORDINALITY c(type, time_ms, data, i);
    UPDATE session.run SET last_seq = v_seq + cardinality(p_types) - 1 WHERE run_id = p_run;
    PERFORM pg_notify('hermesh_log', p_run::text);
    RETURN v_seq + cardinality(p_types) - 1;
END $$;

-- Notes that a run shall be cancelled. Whoever asked first gave the reason. The caller holds the lease row.
CREATE FUNCTION session.request_cancel(p_run uuid, p_reason text) RETURNS void
LANGUAGE sql AS $$
    UPDATE session.run SET cancel_requested = true, cancel_reason = p_reason
    WHERE run_id = p_run AND NOT cancel_requested
$$;

-- Writes what persons decided about a run's calls while an agent held it. The caller holds the lease row, and
-- nobody the lease.
CREATE FUNCTION session.say_resolved(p_run uuid) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_times bigint[];
    v_data text[];
BEGIN
    SELECT array_agg(unsaid_ms ORDER BY unsaid_ms, position), array_agg(unsaid ORDER BY unsaid_ms, position)
    INTO v_times, v_data
    FROM session.tool_call WHERE run_id = p_run AND unsaid <> '';
    IF v_data IS NOT NULL THEN
        PERFORM session.write_unheld(p_run, array_fill('action.resolved'::text, ARRAY[cardinality(v_data)]),
                                     v_times, v_data);
        UPDATE session.tool_call SET unsaid = '' WHERE run_id = p_run AND unsaid <> '';
    END IF;
END $$;

-- Ends a run that nobody holds and that shall be cancelled, with its terminal event. Returns the event's seq.
CREATE FUNCTION session.cancel_unheld(p_run uuid) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_reason text;
    v_seq integer;
BEGIN
    SELECT cancel_reason INTO STRICT v_reason FROM session.run WHERE run_id = p_run AND cancel_requested;
    v_seq := session.write_unheld(p_run, ARRAY['run.cancelled'], ARRAY[session.now_ms()],
                                  ARRAY['{"reason":' || to_json(v_reason)::text || '}']);
    PERFORM session.finish_run(p_run, 6::smallint, v_seq, NULL);
    RETURN v_seq;
END $$;

-- Ends a run that nobody holds as failed, with its terminal event. The error is one that a retry may help.
CREATE FUNCTION session.fail_unheld(p_run uuid, p_code text, p_reason text, p_message text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_error json := json_build_object('code', p_code, 'reason', p_reason, 'message', p_message,
                                      'retryable', true);
    v_seq integer;
BEGIN
    v_seq := session.write_unheld(p_run, ARRAY['run.failed'], ARRAY[session.now_ms()],
        ARRAY['{"code":"' || p_code || '","reason":"' || p_reason || '","message":'
              || to_json(p_message)::text || ',"retryable":true}']);
    PERFORM session.finish_run(p_run, 5::smallint, v_seq, v_error);
END $$;

-- Ends a run that nobody holds if it shall be cancelled or its time is up; returns whether it did. The caller
-- holds the lease row and has seen that the run is queued or running.
CREATE FUNCTION session.end_if_due(p_run uuid) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    v_run session.run%ROWTYPE;
BEGIN
    SELECT * INTO STRICT v_run FROM session.run WHERE run_id = p_run;
    IF v_run.cancel_requested THEN
        PERFORM session.cancel_unheld(p_run);
    ELSIF v_run.deadline <= clock_timestamp() THEN
        PERFORM session.fail_unheld(p_run, 'DEADLINE_EXCEEDED', 'RUN_TIMEOUT',
                                    'the run''s time limit was reached');
    ELSE
        RETURN false;
    END IF;
    RETURN true;
END $$;

-- Ends runs that nobody holds and that need no agent any more: to be cancelled, or past their time limit.
-- Returns how many. Waits for nobody: a lease row that is locked is another's business, and looked at again.
CREATE FUNCTION session.end_orphans(p_limit integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_found record;
    v_lease session.lease%ROWTYPE;
    v_ended integer := 0;
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
        PERFORM FROM session.run r WHERE r.run_id = v_found.run_id AND r.status IN (1, 2) FOR NO KEY UPDATE;
        IF FOUND AND session.end_if_due(v_found.run_id) THEN
            v_ended := v_ended + 1;
        END IF;
    END LOOP;
    RETURN v_ended;
END $$;

-- What an agent needs to go on with a run, as JSON: the newest messages within the limits (all of this
-- run's own whatever their size), this run's events from its last step.started on (all but the first if it
-- has none), its tool calls, the session's user and agent.
-- Callers that have the history in a cache ask with p_max_messages = 0: then it holds the run's own messages
-- and the one before them, whose id and ordinal tell which history fits.
CREATE FUNCTION session.run_context(p_run uuid, p_max_messages integer, p_max_bytes bigint) RETURNS json
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_session session.session%ROWTYPE;
    v_attempt integer;
    v_first integer;
    v_messages json;
    v_kept integer;
    v_events json;
    v_calls json;
    v_step integer;
    v_approval text[];
BEGIN
    SELECT s.* INTO STRICT v_session FROM session.session s JOIN session.run r USING (session_id)
    WHERE r.run_id = p_run;
    SELECT attempt, first_message INTO STRICT v_attempt, v_first FROM session.run WHERE run_id = p_run;
    SELECT t.approval_tools INTO STRICT v_approval FROM session.tenant t
    WHERE t.tenant_id = v_session.tenant_id;
    -- Ordinals have no gap, and a run's own messages are the conversation's last: what is read is the window and
    -- the run, however long the session is. Each condition names an ordinal, or a plan that was made while the
    -- tables were small would read the whole session.
    IF p_max_messages = 0 THEN
        SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                         created_ms) ORDER BY ordinal), count(*)
        INTO v_messages, v_kept
        FROM session.message
        WHERE session_id = v_session.session_id AND NOT rolled_back AND ordinal >= v_first - 1;
    ELSE
        WITH newest AS (
            SELECT m.*, row_number() OVER later AS place,
                   sum(octet_length(content) + octet_length(tool_calls)) OVER later AS bytes
            FROM session.message m
            WHERE m.session_id = v_session.session_id AND NOT m.rolled_back
              AND m.ordinal >= v_first - p_max_messages
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
                                         idempotency_key, fence, needs_approval, tries,
                                         session.quiet_in_ms(quiet_at)) ORDER BY position) INTO v_calls
        FROM session.tool_call WHERE run_id = p_run;
    END IF;
    RETURN json_build_object('messages', v_messages, 'events', v_events, 'tool_calls', v_calls,
                             'user', v_session.user_name, 'agent', v_session.agent,
                             'approval_tools', v_approval,
                             'omitted', v_session.message_count - v_kept);
END $$;

-- Takes the lease of a run for an owner: the only arbiter of who runs it. Outcomes are ClaimOutcome's:
-- 1 claimed, 2 held by another or not its turn, 3 finished (before, or by this call), 4 waits for a person.
-- At the first claim the run's input becomes part of the conversation: its place there is its turn. From then
-- on its time runs, whoever holds it, and a claim that comes too late ends it.
-- Who has the lease may claim again, under a new fence: it asks because the first answer was lost, and so nobody
-- works on the run. That counts as no claim of its own.
CREATE FUNCTION session.claim_run(p_run uuid, p_owner text, p_ttl interval, p_max_idle_claims integer,
                                  p_max_messages integer, p_max_bytes bigint)
RETURNS TABLE (outcome smallint, run session.run_view, fence bigint, attach integer, next_seq integer,
               context json)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_session uuid;
    v_lease session.lease%ROWTYPE;
    v_run session.run%ROWTYPE;
    v_next integer;
    v_idle integer;
    v_count integer;
    v_again boolean;
    v_outcome smallint;
BEGIN
    SELECT r.session_id INTO v_session FROM session.run r WHERE r.run_id = p_run;
    SELECT * INTO v_lease FROM session.lease l WHERE l.session_id = v_session FOR NO KEY UPDATE;
    SELECT * INTO v_run FROM session.run r WHERE r.run_id = p_run FOR NO KEY UPDATE;
    IF v_run.run_id IS NULL OR v_lease.session_id IS NULL THEN
        RAISE EXCEPTION 'RUN_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    v_again := coalesce(v_lease.run_id = p_run AND v_lease.owner = p_owner
                        AND session.in_force(v_lease.lease_until), false);
    v_outcome := CASE
        WHEN v_run.status >= 4 THEN 3
        WHEN v_run.status = 3 THEN 4
        WHEN v_lease.owner IS NOT NULL AND session.in_force(v_lease.lease_until) AND NOT v_again THEN 2
        WHEN EXISTS (SELECT FROM session.run o WHERE o.session_id = v_session
                     AND o.ordinal < v_run.ordinal AND o.status < 4) THEN 2
        ELSE 1 END;
    IF v_outcome = 1 AND session.end_if_due(p_run) THEN
        v_outcome := 3;
    END IF;
    IF v_outcome = 1 THEN
        -- What every attempt writes before it gets anywhere is no progress.
        v_idle := CASE WHEN EXISTS (
            SELECT FROM session.event e WHERE e.run_id = p_run AND e.seq >= v_run.claim_seq
            AND e.type NOT IN ('run.created', 'run.started', 'step.started', 'attempt.reset',
                               'context.degraded', 'memory.recalled'))
            THEN 0 ELSE v_run.idle_claims END;
        IF v_idle >= p_max_idle_claims AND NOT v_again THEN
            PERFORM session.fail_unheld(p_run, 'INTERNAL', 'ATTEMPTS_EXHAUSTED',
                format('the run lost its agent %s times without any progress', v_idle));
            v_outcome := 3;
        END IF;
    END IF;
    IF v_outcome <> 1 THEN
        RETURN QUERY SELECT v_outcome, v, NULL::bigint, NULL::integer, NULL::integer, NULL::json
        FROM session.run_view v WHERE v.run_id = p_run;
        RETURN;
    END IF;
    IF v_run.attempt > 0 THEN
        PERFORM session.say_resolved(p_run);
    END IF;
    v_next := CASE WHEN v_run.attempt = 0 THEN v_run.last_seq + 1 ELSE session.next_seq(p_run) END;
    UPDATE session.lease l SET run_id = p_run, fence = l.fence + 1, attach = 0, next_seq = v_next,
           owner = p_owner, lease_until = clock_timestamp() + p_ttl
    WHERE l.session_id = v_session
    RETURNING * INTO v_lease;
    IF v_run.input IS NOT NULL THEN
        UPDATE session.session s SET message_count = s.message_count + json_array_length(v_run.input)
        WHERE s.session_id = v_session
        RETURNING s.message_count - json_array_length(v_run.input) INTO v_count;
    END IF;
    UPDATE session.run r SET status = 2, attempt = r.attempt + 1,
           idle_claims = v_idle + CASE WHEN v_again THEN 0 ELSE 1 END,
           claim_seq = v_next, last_seq = v_next - 1, input = NULL, dispatch_after = clock_timestamp(),
           first_message = coalesce(r.first_message, v_count + 1),
           deadline = coalesce(r.deadline, clock_timestamp() + r.left_ms * interval '1 ms')
    WHERE r.run_id = p_run;
    IF v_run.input IS NOT NULL THEN
        INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content,
                                     tool_calls, tool_call_id, created_ms)
        SELECT v_session, (m.value ->> 0)::uuid, v_run.tenant_id, p_run, v_count + m.place, m.value ->> 1,
               m.value ->> 2, '', '', v_run.created_ms
        FROM json_array_elements(v_run.input) WITH ORDINALITY m(value, place);
    END IF;
    IF v_run.attempt > 0 THEN
        -- Its former agent may have acted and not said so.
        UPDATE session.tool_call t SET state = 5
        WHERE t.run_id = p_run AND t.state = 2 AND t.effect = 3;
    END IF;
    RETURN QUERY SELECT 1::smallint, v, v_lease.fence, v_lease.attach, v_lease.next_seq,
                        session.run_context(p_run, p_max_messages, p_max_bytes)
    FROM session.run_view v WHERE v.run_id = p_run;
END $$;

-- Accepts input: idempotency key, run and first event, and the lease if p_owner asks for it and the session
-- is free. The first event's data is p_data_head, the run's ordinal, p_data_mid, the session's agent as
-- JSON, and p_data_tail. p_policy is ConcurrencyPolicy's: 0 the tenant's, 1 enqueue, 2 reject, 3 interrupt,
-- 4 rollback. p_timeout_ms is the run's time limit if it sets one, else 0, and p_default_timeout_ms that of
-- runs for which neither they nor their tenant set one.
CREATE FUNCTION session.submit_run(
    p_tenant uuid, p_session uuid, p_run uuid, p_request_id text, p_fingerprint bytea, p_policy integer,
    p_timeout_ms bigint, p_default_timeout_ms bigint, p_input json, p_options bytea, p_model text, p_title text,
    p_data_head text, p_data_mid text, p_data_tail text, p_time_ms bigint, p_owner text, p_ttl interval,
    p_max_idle_claims integer, p_max_messages integer, p_max_bytes bigint)
RETURNS TABLE (duplicate boolean, created_ms bigint, created_data text, outcome smallint,
               run session.run_view, fence bigint, attach integer, next_seq integer, context json)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_known session.idempotency%ROWTYPE;
    v_lease session.lease%ROWTYPE;
    v_other session.run%ROWTYPE;
    v_tenant session.tenant%ROWTYPE;
    v_policy integer;
    v_busy boolean := false;
    v_ordinal integer;
    v_agent text;
    v_data text;
    v_now bigint := session.now_ms();
BEGIN
    IF p_request_id <> '' THEN
        -- Waits for another call with the same key that is under way.
        INSERT INTO session.idempotency (tenant_id, scope, key, fingerprint, result_id)
        VALUES (p_tenant, 'run', p_request_id, p_fingerprint, p_run)
        ON CONFLICT (tenant_id, scope, key) DO NOTHING;
        IF NOT FOUND THEN
            SELECT * INTO v_known FROM session.idempotency i
            WHERE i.tenant_id = p_tenant AND i.scope = 'run' AND i.key = p_request_id;
            IF v_known.fingerprint IS DISTINCT FROM p_fingerprint THEN
                RAISE EXCEPTION 'REQUEST_ID_REUSED' USING ERRCODE = 'HM409';
            END IF;
            RETURN QUERY
            SELECT true, coalesce(e.time_ms, v.created_ms), coalesce(e.data, '{}'), NULL::smallint, v,
                   NULL::bigint, NULL::integer, NULL::integer, NULL::json
            FROM session.run_view v
            LEFT JOIN session.event e ON e.run_id = v_known.result_id AND e.seq = 1
            WHERE v.run_id = v_known.result_id AND v.tenant_id = p_tenant;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'SESSION_NOT_FOUND' USING ERRCODE = 'HM404';
            END IF;
            RETURN;
        END IF;
    END IF;
    SELECT * INTO v_lease FROM session.lease l
    WHERE l.session_id = p_session AND l.tenant_id = p_tenant FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'SESSION_NOT_FOUND' USING ERRCODE = 'HM404';
    END IF;
    SELECT * INTO STRICT v_tenant FROM session.tenant t WHERE t.tenant_id = p_tenant;
    v_policy := coalesce(nullif(p_policy, 0), v_tenant.concurrency);
    FOR v_other IN SELECT * FROM session.run r WHERE r.session_id = p_session AND r.status < 4
                   ORDER BY r.ordinal DESC LOOP
        IF v_policy = 2 THEN
            RAISE EXCEPTION 'SESSION_BUSY' USING ERRCODE = 'HM412';
        ELSIF v_policy IN (3, 4) THEN
            PERFORM session.request_cancel(v_other.run_id, 'interrupted by new input');
            IF v_policy = 4 THEN
                UPDATE session.run r SET rollback = true WHERE r.run_id = v_other.run_id;
            END IF;
            IF v_lease.run_id = v_other.run_id AND v_lease.owner IS NOT NULL
               AND session.in_force(v_lease.lease_until) THEN
                PERFORM pg_notify('hermesh_cancel', v_other.run_id::text);
                v_busy := true;
            ELSE
                PERFORM session.cancel_unheld(v_other.run_id);
            END IF;
        ELSE
            v_busy := true;
            EXIT;
        END IF;
    END LOOP;
    UPDATE session.session s SET run_count = s.run_count + 1, updated_ms = greatest(s.updated_ms, v_now),
           title = CASE WHEN s.title = '' THEN p_title ELSE s.title END
    WHERE s.session_id = p_session
    RETURNING s.run_count, s.agent INTO v_ordinal, v_agent;
    INSERT INTO session.run (run_id, tenant_id, session_id, ordinal, status, model, options, input, last_seq,
                             created_ms, dispatch_after, left_ms)
    VALUES (p_run, p_tenant, p_session, v_ordinal, 1, p_model, p_options, p_input, 1, v_now,
            CASE WHEN v_busy THEN NULL ELSE clock_timestamp() END,
            coalesce(nullif(p_timeout_ms, 0), v_tenant.run_timeout_ms, p_default_timeout_ms));
    v_data := p_data_head || v_ordinal::text || p_data_mid || to_json(v_agent)::text || p_data_tail;
    INSERT INTO session.event (run_id, seq, time_ms, tenant_id, session_id, fence, type, data)
    VALUES (p_run, 1, p_time_ms, p_tenant, p_session, 0, 'run.created', v_data);
    IF p_owner <> '' AND NOT v_busy THEN
        RETURN QUERY SELECT false, p_time_ms, v_data, c.outcome, c.run, c.fence, c.attach, c.next_seq, c.context
        FROM session.claim_run(p_run, p_owner, p_ttl, p_max_idle_claims, p_max_messages, p_max_bytes) c;
        RETURN;
    END IF;
    IF NOT v_busy THEN
        PERFORM pg_notify('hermesh_due', p_session::text);
    END IF;
    RETURN QUERY SELECT false, p_time_ms, v_data, NULL::smallint, v, NULL::bigint, NULL::integer,
                        NULL::integer, NULL::json
    FROM session.run_view v WHERE v.run_id = p_run;
END $$;

-- Writes one append with what commits beside it. Outcomes are AppendOutcome's: 1 committed, 2 fenced, 3 gap;
-- p_status is RunStatus's or NULL.
-- A run that parks for a person leaves nothing unsaid behind it.
CREATE FUNCTION session.append_step(
    p_session uuid, p_run uuid, p_fence bigint, p_first_seq integer, p_types text[], p_times bigint[],
    p_data text[], p_messages json, p_intents json, p_status smallint, p_error json, p_input_tokens integer,
    p_output_tokens integer, p_cached_tokens integer,
    OUT outcome smallint, OUT next_seq integer)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    v_lease session.lease%ROWTYPE;
    v_run session.run%ROWTYPE;
    v_count integer;
    v_added integer := 0;
    v_now bigint := session.now_ms();
BEGIN
    UPDATE session.lease l SET next_seq = l.next_seq + cardinality(p_types)
    WHERE l.session_id = p_session AND l.run_id = p_run AND l.fence = p_fence AND l.next_seq = p_first_seq
      AND l.owner IS NOT NULL
    RETURNING * INTO v_lease;
    IF NOT FOUND THEN
        SELECT r.outcome, r.next_seq INTO append_step.outcome, append_step.next_seq
        FROM session.refusal(p_session, p_run, p_fence, p_first_seq, cardinality(p_types)) r;
        RETURN;
    END IF;
    INSERT INTO session.event (run_id, seq, time_ms, tenant_id, session_id, fence, type, data)
    SELECT p_run, p_first_seq + c.i::integer - 1, c.time_ms, v_lease.tenant_id, p_session, p_fence, c.type, c.data
    FROM unnest(p_types, p_times, p_data) WITH ORDINALITY c(type, time_ms, data, i);
    IF p_messages IS NOT NULL THEN
        SELECT s.message_count INTO STRICT v_count FROM session.session s WHERE s.session_id = p_session;
        -- A message that is there already came with a step without events, which was sent again. Looked up by
        -- its id: a join would read the whole conversation.
        INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content,
                                     tool_calls, tool_call_id, created_ms)
        SELECT p_session, (m.value ->> 0)::uuid, v_lease.tenant_id, p_run,
               v_count + row_number() OVER (ORDER BY m.place), m.value ->> 1, m.value ->> 2, m.value ->> 3,
               m.value ->> 4, v_now
        FROM json_array_elements(p_messages) WITH ORDINALITY m(value, place)
        WHERE (m.value ->> 0)::uuid <> ALL (ARRAY(
            SELECT o.message_id FROM session.message o
            WHERE o.session_id = p_session AND o.message_id = ANY (ARRAY(
                SELECT (k.value ->> 0)::uuid FROM json_array_elements(p_messages) k))));
        GET DIAGNOSTICS v_added = ROW_COUNT;
        UPDATE session.session s SET message_count = s.message_count + v_added
        WHERE s.session_id = p_session;
    END IF;
    IF p_input_tokens IS NOT NULL THEN
        UPDATE session.run r SET input_tokens = p_input_tokens, output_tokens = p_output_tokens,
               cached_tokens = p_cached_tokens
        WHERE r.run_id = p_run;
    END IF;
    IF p_intents IS NOT NULL THEN
        -- An intent that was never acted on may be made anew, with other arguments.
        INSERT INTO session.tool_call AS t (call_id, tenant_id, session_id, run_id, name, arguments, effect,
                                            idempotency_key, needs_approval, created_ms)
        SELECT c.value ->> 0, v_lease.tenant_id, p_session, p_run, c.value ->> 1, c.value ->> 2,
               (c.value ->> 3)::smallint, c.value ->> 4, (c.value ->> 5)::boolean, v_now
        FROM json_array_elements(p_intents) WITH ORDINALITY c(value, place)
        ORDER BY c.place
        ON CONFLICT (call_id) DO UPDATE SET name = excluded.name, arguments = excluded.arguments,
            effect = excluded.effect, idempotency_key = excluded.idempotency_key,
            needs_approval = excluded.needs_approval
        WHERE t.state = 1 AND t.tries = 0 AND t.run_id = excluded.run_id;
    END IF;
    outcome := 1;
    next_seq := v_lease.next_seq;
    IF p_status >= 4 THEN
        PERFORM session.finish_run(p_run, p_status, v_lease.next_seq - 1, p_error);
    ELSIF p_status = 3 THEN
        -- The run keeps the session's place: later runs wait for the person, too.
        UPDATE session.lease l SET owner = NULL, lease_until = NULL WHERE l.session_id = p_session;
        -- A person may take days: meanwhile the run's time stands still.
        UPDATE session.run r SET status = 3, last_seq = v_lease.next_seq - 1, dispatch_after = NULL,
               left_ms = greatest(0, session.ms_until(r.deadline)), deadline = NULL
        WHERE r.run_id = p_run;
        UPDATE session.session s SET updated_ms = greatest(s.updated_ms, v_now)
        WHERE s.session_id = p_session;
        -- Whoever waits for a person has nothing under way: a call that must not run twice and has no outcome is
        -- one to ask about.
        UPDATE session.tool_call t SET state = 5 WHERE t.run_id = p_run AND t.state = 2 AND t.effect = 3;
        -- What was said while this step was on its way would find nobody to hear it later.
        SELECT * INTO v_run FROM session.run r WHERE r.run_id = p_run;
        PERFORM session.say_resolved(p_run);
        IF v_run.cancel_requested THEN
            PERFORM session.cancel_unheld(p_run);
        ELSIF EXISTS (SELECT FROM session.tool_call t WHERE t.run_id = p_run) THEN
            PERFORM session.requeue_run(p_run);
        END IF;
    END IF;
END $$;

-- Why an append was refused: 3 with the next seq if the fence is current and the place is not, or if this
-- very write, under this very fence, is in the log already as the run's last; else 2.
-- 4 (send it again) if what refused the append is over by the time of this look: the place may have come to
-- match meanwhile, and a writer must not take that for a lost lease.
CREATE FUNCTION session.refusal(p_session uuid, p_run uuid, p_fence bigint, p_first_seq integer,
                                           p_n integer, OUT outcome smallint, OUT next_seq integer)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN l.run_id = p_run AND l.fence = p_fence AND l.next_seq <> p_first_seq THEN 3
                WHEN l.run_id = p_run AND l.fence = p_fence AND l.owner IS NOT NULL THEN 4
                WHEN r.status >= 4 AND r.last_seq = p_first_seq + p_n - 1
                     AND EXISTS (SELECT FROM session.event e WHERE e.run_id = p_run
                                 AND e.seq = p_first_seq + p_n - 1 AND e.fence = p_fence) THEN 3
                ELSE 2 END::smallint,
           CASE WHEN l.run_id = p_run THEN l.next_seq ELSE coalesce(r.last_seq, 0) + 1 END
    FROM (SELECT p_session AS session_id) p
    LEFT JOIN session.lease l USING (session_id)
    LEFT JOIN session.run r ON r.run_id = p_run AND r.session_id = p_session
$$;
