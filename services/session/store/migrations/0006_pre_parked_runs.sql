-- As in 0003, and tells every replica: events that no writer sent come to watchers at once only if somebody
-- says so. Rare (cancels, lost runs, a person's word), so that NOTIFY stays off the hot path.
CREATE OR REPLACE FUNCTION session.write_unheld(p_run uuid, p_types text[], p_times bigint[], p_data text[])
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

-- As in 0003; and a run that parks for a person leaves nothing unsaid behind it.
--
-- Writes one append with what commits beside it. Outcomes are AppendOutcome's: 1 committed, 2 fenced, 3 gap;
-- p_status is RunStatus's or NULL.
CREATE OR REPLACE FUNCTION session.append_step(
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
        -- A message that is there already came with a step without events, which was sent again.
        INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content,
                                     tool_calls, tool_call_id, created_ms)
        SELECT p_session, (m.value ->> 0)::uuid, v_lease.tenant_id, p_run,
               v_count + row_number() OVER (ORDER BY m.place), m.value ->> 1, m.value ->> 2, m.value ->> 3,
               m.value ->> 4, v_now
        FROM json_array_elements(p_messages) WITH ORDINALITY m(value, place)
        WHERE NOT EXISTS (SELECT FROM session.message o
                          WHERE o.session_id = p_session AND o.message_id = (m.value ->> 0)::uuid);
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
                                            idempotency_key, created_ms)
        SELECT c.value ->> 0, v_lease.tenant_id, p_session, p_run, c.value ->> 1, c.value ->> 2,
               (c.value ->> 3)::smallint, c.value ->> 4, v_now
        FROM json_array_elements(p_intents) WITH ORDINALITY c(value, place)
        ORDER BY c.place
        ON CONFLICT (call_id) DO UPDATE SET name = excluded.name, arguments = excluded.arguments,
            effect = excluded.effect, idempotency_key = excluded.idempotency_key
        WHERE t.state = 1 AND t.run_id = excluded.run_id;
    END IF;
    outcome := 1;
    next_seq := v_lease.next_seq;
    IF p_status >= 4 THEN
        PERFORM session.finish_run(p_run, p_status, v_lease.next_seq - 1, p_error);
    ELSIF p_status = 3 THEN
        -- The run keeps the session's place: later runs wait for the person, too.
        UPDATE session.lease l SET owner = NULL, lease_until = NULL WHERE l.session_id = p_session;
        UPDATE session.run r SET status = 3, last_seq = v_lease.next_seq - 1, dispatch_after = NULL
        WHERE r.run_id = p_run;
        UPDATE session.session s SET updated_ms = greatest(s.updated_ms, v_now)
        WHERE s.session_id = p_session;
        -- Whoever waits for a person has nothing under way: a call without an outcome is one to ask about.
        UPDATE session.tool_call t SET state = 5 WHERE t.run_id = p_run AND t.state = 2;
        -- What was said while this step was on its way would find nobody to hear it later.
        SELECT * INTO v_run FROM session.run r WHERE r.run_id = p_run;
        IF v_run.cancel_requested THEN
            PERFORM session.cancel_unheld(p_run, v_run.cancel_reason);
        ELSIF EXISTS (SELECT FROM session.tool_call t WHERE t.run_id = p_run)
              AND NOT EXISTS (SELECT FROM session.tool_call t WHERE t.run_id = p_run AND t.state IN (1, 5)) THEN
            PERFORM session.requeue_run(p_run);
        END IF;
    END IF;
END $$;
