-- The schema that migrations/ build, as pg_dump shows it; for reading and for a test, never applied.
-- After a new migration: HERMESH_WRITE_SCHEMA=1 make test ARGS=tests/migration

CREATE SCHEMA session;

CREATE FUNCTION session.append_step(p_session uuid, p_run uuid, p_fence bigint, p_first_seq integer, p_types text[], p_times bigint[], p_data text[], p_messages json, p_intents json, p_status smallint, p_error json, p_input_tokens integer, p_output_tokens integer, p_cached_tokens integer, OUT outcome smallint, OUT next_seq integer) RETURNS record
    LANGUAGE plpgsql
    SET lock_timeout TO '200ms'
    AS $$
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

CREATE TABLE session.tool_call (
    call_id text NOT NULL,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    run_id uuid NOT NULL,
    "position" integer NOT NULL,
    name text NOT NULL,
    arguments text NOT NULL,
    effect smallint NOT NULL,
    state smallint DEFAULT 1 NOT NULL,
    content text DEFAULT ''::text NOT NULL,
    content_ref text DEFAULT ''::text NOT NULL,
    idempotency_key text NOT NULL,
    fence bigint DEFAULT 0 NOT NULL,
    tries integer DEFAULT 0 NOT NULL,
    quiet_at timestamp with time zone,
    needs_approval boolean DEFAULT false NOT NULL,
    unsaid text DEFAULT ''::text NOT NULL,
    unsaid_ms bigint DEFAULT 0 NOT NULL,
    created_ms bigint NOT NULL,
    ended_try integer DEFAULT 0 NOT NULL,
    ended_ahead integer[] DEFAULT '{}'::integer[] NOT NULL,
    CONSTRAINT tool_call_effect_check CHECK (((effect >= 1) AND (effect <= 3))),
    CONSTRAINT tool_call_state_check CHECK (((state >= 1) AND (state <= 5)))
);

COMMENT ON COLUMN session.tool_call.fence IS 'under which it was begun last';

COMMENT ON COLUMN session.tool_call.tries IS 'how often it was begun';

COMMENT ON COLUMN session.tool_call.quiet_at IS 'from when on no try that was begun can act any more; NULL: none was';

COMMENT ON COLUMN session.tool_call.needs_approval IS 'a person has to agree before it may begin; false once one has';

COMMENT ON COLUMN session.tool_call.unsaid IS 'the data of an action.resolved that was decided while an agent held the run, and is not in the log yet';

COMMENT ON COLUMN session.tool_call.ended_try IS 'the last try up to which all are known to have ended, whatever came of them';

COMMENT ON COLUMN session.tool_call.ended_ahead IS 'later tries that are known to have ended';

CREATE FUNCTION session.begin_tool_call(p_call text, p_session uuid, p_fence bigint, p_act interval) RETURNS TABLE(outcome smallint, call session.tool_call)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.call_waits(p_state smallint, p_needs_approval boolean) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN ((p_state = 5) OR ((p_state = 1) AND p_needs_approval));

CREATE FUNCTION session.ms_until(p_time timestamp with time zone) RETURNS bigint
    LANGUAGE sql PARALLEL SAFE
    RETURN (ceil((EXTRACT(epoch FROM (p_time - clock_timestamp())) * (1000)::numeric)))::bigint;

CREATE TABLE session.lease (
    session_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    run_id uuid,
    fence bigint DEFAULT 0 NOT NULL,
    next_seq integer DEFAULT 1 NOT NULL,
    owner text,
    attach integer DEFAULT 0 NOT NULL,
    lease_until timestamp with time zone
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='200');

COMMENT ON COLUMN session.lease.run_id IS 'the run that held it last; next_seq is of that run';

COMMENT ON COLUMN session.lease.owner IS 'the replica that holds it, NULL when it is free';

CREATE TABLE session.run (
    run_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    ordinal integer NOT NULL,
    status smallint NOT NULL,
    model text NOT NULL,
    options bytea NOT NULL,
    input json,
    attempt integer DEFAULT 0 NOT NULL,
    idle_claims smallint DEFAULT 0 NOT NULL,
    claim_seq integer DEFAULT 1 NOT NULL,
    first_message integer,
    last_seq integer NOT NULL,
    error json,
    input_tokens integer,
    output_tokens integer,
    cached_tokens integer,
    created_ms bigint NOT NULL,
    finished_ms bigint DEFAULT 0 NOT NULL,
    cancel_requested boolean DEFAULT false NOT NULL,
    cancel_reason text DEFAULT ''::text NOT NULL,
    rollback boolean DEFAULT false NOT NULL,
    dispatch_after timestamp with time zone,
    left_ms bigint NOT NULL,
    deadline timestamp with time zone,
    CONSTRAINT run_status_check CHECK (((status >= 1) AND (status <= 6)))
)
WITH (fillfactor='80');

COMMENT ON COLUMN session.run.input IS 'NULL once its messages are in the conversation: at the first claim';

COMMENT ON COLUMN session.run.idle_claims IS 'claims in a row that moved nothing';

COMMENT ON COLUMN session.run.claim_seq IS 'the next_seq of the last claim';

COMMENT ON COLUMN session.run.first_message IS 'ordinal of its first message; it and what follows while the run is not finished are the run''s own';

COMMENT ON COLUMN session.run.last_seq IS 'as of the last change of this row; while the run is held, lease.next_seq knows better';

COMMENT ON COLUMN session.run.rollback IS 'drop its messages from the conversation once it ends';

COMMENT ON COLUMN session.run.dispatch_after IS 'NULL while another run of the session goes first';

COMMENT ON COLUMN session.run.left_ms IS 'how long it may take, as of when its time last stood still';

COMMENT ON COLUMN session.run.deadline IS 'when its time is up; NULL while it stands still: before the first claim, and while a person is awaited';

CREATE VIEW session.run_view AS
 SELECT r.run_id,
    r.session_id,
    r.tenant_id,
    r.ordinal,
    r.status,
    r.model,
    r.attempt,
        CASE
            WHEN (l.run_id = r.run_id) THEN GREATEST(r.last_seq, (l.next_seq - 1))
            ELSE r.last_seq
        END AS last_seq,
    r.error,
    r.input_tokens,
    r.output_tokens,
    r.cached_tokens,
    r.created_ms,
    r.finished_ms,
    r.cancel_requested,
    r.cancel_reason,
    r.options,
        CASE
            WHEN (r.deadline IS NULL) THEN r.left_ms
            ELSE session.ms_until(r.deadline)
        END AS time_left_ms
   FROM (session.run r
     JOIN session.lease l USING (session_id));

CREATE FUNCTION session.cancel_run(p_tenant uuid, p_run uuid, p_reason text) RETURNS TABLE(run session.run_view, event_seq integer, event_time_ms bigint, event_data text)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.cancel_unheld(p_run uuid) RETURNS integer
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.claim_run(p_run uuid, p_owner text, p_ttl interval, p_max_idle_claims integer, p_max_messages integer, p_max_bytes bigint) RETURNS TABLE(outcome smallint, run session.run_view, fence bigint, attach integer, next_seq integer, context json)
    LANGUAGE sql
    AS $$
    SELECT * FROM session.claim_run(p_run, p_owner, p_ttl, p_max_idle_claims, p_max_messages, p_max_bytes, NULL)
$$;

CREATE FUNCTION session.claim_run(p_run uuid, p_owner text, p_ttl interval, p_max_idle_claims integer, p_max_messages integer, p_max_bytes bigint, p_page_bytes bigint) RETURNS TABLE(outcome smallint, run session.run_view, fence bigint, attach integer, next_seq integer, context json)
    LANGUAGE plpgsql
    AS $$
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
        v_idle := CASE WHEN v_run.attempt > 0 AND session.made_progress(p_run, v_run.claim_seq)
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
                        session.run_context(p_run, p_max_messages, p_max_bytes, p_page_bytes)
    FROM session.run_view v WHERE v.run_id = p_run;
END $$;

CREATE FUNCTION session.complete_tool_call(p_call text, p_fence bigint, p_state smallint, p_content text, p_ref text, p_tries integer) RETURNS SETOF session.tool_call
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.confirm() RETURNS boolean
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF current_setting('synchronous_standby_names') = '' THEN
        RETURN false;
    END IF;
    -- Nothing of it is stored; its record in the log comes after all that it confirms.
    PERFORM pg_logical_emit_message(true, 'hermesh', '');
    RETURN true;
END $$;

CREATE FUNCTION session.context_page(p_run uuid, p_message integer, p_call integer, p_event integer, p_bytes bigint, OUT messages json, OUT tool_calls json, OUT events json, OUT next json) RETURNS record
    LANGUAGE plpgsql STABLE
    AS $$
#variable_conflict use_column
DECLARE
    -- So many rows are looked at for one page.
    c_rows CONSTANT integer := CASE WHEN p_bytes IS NULL THEN NULL ELSE 500 END;
    v_room bigint := coalesce(p_bytes, 9223372036854775807);
    v_session uuid;
    v_first integer;
    v_attempt integer;
    v_last integer;
    v_bytes bigint;
    v_step integer;
BEGIN
    SELECT r.session_id, r.first_message, r.attempt INTO STRICT v_session, v_first, v_attempt
    FROM session.run r WHERE r.run_id = p_run;
    -- Each condition names an ordinal, or a plan that was made while the tables were small would read the whole
    -- session. Sizes are those of the whole text and cost no read of it.
    WITH own AS (
        SELECT m.*, octet_length(content) + octet_length(tool_calls) AS size,
               sum(octet_length(content) + octet_length(tool_calls)) OVER (ORDER BY ordinal) AS upto
        FROM (SELECT * FROM session.message
              WHERE session_id = v_session AND NOT rolled_back
                AND ordinal > greatest(p_message, v_first - 1)
              ORDER BY ordinal LIMIT c_rows) m
    )
    SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                     created_ms) ORDER BY ordinal), max(ordinal), sum(size)
    INTO messages, v_last, v_bytes
    FROM own WHERE upto - size < v_room;
    p_message := coalesce(v_last, p_message);
    v_room := v_room - coalesce(v_bytes, 0);
    IF v_room > 0 AND p_bytes IS NOT NULL AND EXISTS (
            SELECT FROM session.message WHERE session_id = v_session AND NOT rolled_back
              AND ordinal > greatest(p_message, v_first - 1)) THEN
        v_room := 0;
    END IF;
    -- Before its first claim a run has nothing but run.created.
    IF v_room > 0 AND v_attempt > 1 THEN
        WITH answered AS (
            SELECT m.tool_call_id FROM session.message m
            WHERE m.session_id = v_session AND NOT m.rolled_back AND m.ordinal >= v_first AND m.tool_call_id <> ''
        ), pending AS (
            SELECT c.*, octet_length(content) + octet_length(arguments) AS size,
                   sum(octet_length(content) + octet_length(arguments)) OVER (ORDER BY position) AS upto
            FROM session.tool_call c
            WHERE c.run_id = p_run AND c.position > p_call
              AND NOT EXISTS (SELECT FROM answered a WHERE a.tool_call_id = c.call_id)
        )
        SELECT json_agg(json_build_array(call_id, name, arguments, effect, state, content, content_ref,
                                         idempotency_key, fence, needs_approval, tries,
                                         session.quiet_in_ms(quiet_at)) ORDER BY position)
                   FILTER (WHERE upto - size < v_room),
               max(position) FILTER (WHERE upto - size < v_room),
               sum(size)
        INTO tool_calls, v_last, v_bytes
        FROM pending;
        p_call := coalesce(v_last, p_call);
        v_room := v_room - coalesce(v_bytes, 0);
    END IF;
    IF v_room > 0 AND v_attempt > 1 THEN
        SELECT seq INTO v_step FROM session.event WHERE run_id = p_run AND type = 'step.started'
        ORDER BY seq DESC LIMIT 1;
        WITH told AS (
            SELECT e.seq, e.type, e.time_ms,
                   CASE e.type
                   WHEN 'reasoning.delta' THEN '{"text":""}'
                   WHEN 'message.completed' THEN '{}'
                   WHEN 'action.required' THEN
                       coalesce(substring(e.data from '^{"call_id":"[^"\\]+"') || '}', e.data)
                   WHEN 'tool.result' THEN
                       CASE WHEN EXISTS (SELECT FROM session.tool_call c WHERE c.call_id =
                                         substring(e.data from '^{"call_id":"([^"\\]+)","status":"[a-z]+"'))
                       THEN substring(e.data from '^{"call_id":"[^"\\]+","status":"[a-z]+"') || '}'
                       ELSE e.data END
                   ELSE e.data END AS data
            FROM session.event e
            WHERE e.run_id = p_run AND e.seq >= coalesce(v_step, 2) AND e.seq > p_event
              AND e.type IN ('step.started', 'text.delta', 'reasoning.delta', 'attempt.reset',
                             'message.completed', 'tool.result', 'action.required', 'action.resolved')
            ORDER BY e.seq LIMIT c_rows
        ), sized AS (
            SELECT t.*, octet_length(data) AS size, sum(octet_length(data)) OVER (ORDER BY seq) AS upto FROM told t
        )
        SELECT json_agg(json_build_array(seq, type, time_ms, data) ORDER BY seq)
                   FILTER (WHERE upto - size < v_room),
               max(seq) FILTER (WHERE upto - size < v_room),
               -- A full look may have left some out, too.
               sum(size) + CASE WHEN count(*) = c_rows THEN v_room ELSE 0 END
        INTO events, v_last, v_bytes
        FROM sized;
        p_event := coalesce(v_last, p_event);
        v_room := v_room - coalesce(v_bytes, 0);
    END IF;
    IF v_room <= 0 THEN
        next := json_build_array(p_message, p_call, p_event);
    END IF;
END $$;

CREATE FUNCTION session.end_if_due(p_run uuid) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.end_orphans(p_limit integer) RETURNS integer
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

CREATE FUNCTION session.end_try(p_call text, p_fence bigint, p_state smallint, p_content text, p_ref text, p_tries integer, p_acts boolean) RETURNS SETOF session.tool_call
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.fail_held(p_session uuid, p_run uuid, p_fence bigint, p_message text) RETURNS SETOF session.run_view
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.fail_unheld(p_run uuid, p_code text, p_reason text, p_message text) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.finish_run(p_run uuid, p_status smallint, p_last_seq integer, p_error json) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.in_force(p_until timestamp with time zone) RETURNS boolean
    LANGUAGE sql PARALLEL SAFE
    RETURN ((p_until >= clock_timestamp()) AND (p_until <= (clock_timestamp() + '00:01:00'::interval)));

CREATE FUNCTION session.join_input(p_run uuid) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE TABLE session.event (
    run_id uuid NOT NULL,
    seq integer NOT NULL,
    time_ms bigint NOT NULL,
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    fence bigint NOT NULL,
    type text NOT NULL,
    data text NOT NULL
)
PARTITION BY RANGE (run_id);

CREATE FUNCTION session.made_progress(p_run uuid, p_claim_seq integer) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN ((EXISTS (SELECT FROM session.event e WHERE ((e.run_id = made_progress.p_run) AND (e.seq >= made_progress.p_claim_seq) AND (e.type <> ALL (ARRAY['run.created'::text, 'run.started'::text, 'step.started'::text, 'attempt.reset'::text, 'context.degraded'::text, 'memory.recalled'::text, 'tool.progress'::text, 'tool.reconciled'::text, 'text.delta'::text, 'reasoning.delta'::text]))))) OR (EXISTS (SELECT FROM session.event e WHERE ((e.run_id = made_progress.p_run) AND (e.seq >= made_progress.p_claim_seq) AND (e.type = ANY (ARRAY['text.delta'::text, 'reasoning.delta'::text])) AND (NOT (EXISTS (SELECT FROM session.event o WHERE ((o.run_id = made_progress.p_run) AND (o.seq >= made_progress.p_claim_seq) AND (o.type = 'attempt.reset'::text)))))))));

CREATE FUNCTION session.maintain_partitions(p_ahead integer, p_retention interval, OUT made integer, OUT dropped integer) RETURNS record
    LANGUAGE plpgsql
    AS $_$
DECLARE
    v_today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    v_day date;
    v_name text;
    v_from uuid;
    v_to uuid;
    v_oldest uuid := session.uuid7_floor(clock_timestamp() - p_retention);
BEGIN
    made := 0;
    dropped := 0;
    BEGIN
        -- Conflicts with itself and with no reader or writer.
        LOCK TABLE session.event_default IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
    END;
    FOR v_day IN SELECT d::date FROM generate_series(v_today - 1, v_today + p_ahead, interval '1 day') d LOOP
        v_name := 'event_p' || to_char(v_day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('session.' || v_name) IS NOT NULL;
        v_from := session.uuid7_floor(v_day::timestamp AT TIME ZONE 'UTC');
        v_to := session.uuid7_floor((v_day + 1)::timestamp AT TIME ZONE 'UTC');
        -- LIKE and ATTACH lock less than PARTITION OF, which would stop every append for a moment.
        EXECUTE format('CREATE TABLE session.%I (LIKE session.event INCLUDING ALL)', v_name);
        -- Rows that came while the partition was missing move over, or ATTACH would refuse.
        IF EXISTS (SELECT FROM session.event_default WHERE run_id >= v_from AND run_id < v_to) THEN
            LOCK TABLE session.event_default IN ACCESS EXCLUSIVE MODE;
            EXECUTE format('WITH moved AS (DELETE FROM session.event_default WHERE run_id >= $1 AND run_id < $2 '
                           'RETURNING *) INSERT INTO session.%I SELECT * FROM moved', v_name)
            USING v_from, v_to;
        END IF;
        EXECUTE format('ALTER TABLE session.event ATTACH PARTITION session.%I FOR VALUES FROM (%L) TO (%L)',
                       v_name, v_from, v_to);
        made := made + 1;
    END LOOP;
    FOR v_name IN
        SELECT c.relname FROM pg_inherits i
        JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'session.event'::regclass AND c.relname ~ '^event_p[0-9]{8}$'
          AND session.uuid7_floor((to_date(substr(c.relname, 8), 'YYYYMMDD') + 1)::timestamp
                                  AT TIME ZONE 'UTC') <= v_oldest
        ORDER BY c.relname
    LOOP
        EXECUTE format('DROP TABLE session.%I', v_name);
        dropped := dropped + 1;
    END LOOP;
    DELETE FROM session.event_default WHERE run_id < v_oldest;
END $_$;

CREATE FUNCTION session.next_seq(p_run uuid) RETURNS integer
    LANGUAGE sql STABLE
    RETURN (SELECT (1 + GREATEST(v.last_seq, (SELECT max(e.seq) AS max FROM session.event e WHERE (e.run_id = next_seq.p_run)))) FROM session.run_view v WHERE (v.run_id = next_seq.p_run));

CREATE FUNCTION session.note_gone_session() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF EXISTS (SELECT FROM session.tool_call c WHERE c.session_id = OLD.session_id) THEN
        INSERT INTO session.gone_session (session_id, tenant_id) VALUES (OLD.session_id, OLD.tenant_id)
        ON CONFLICT (session_id) DO NOTHING;
    END IF;
    RETURN OLD;
END $$;

CREATE FUNCTION session.now_ms() RETURNS bigint
    LANGUAGE sql PARALLEL SAFE
    RETURN ((EXTRACT(epoch FROM clock_timestamp()) * (1000)::numeric))::bigint;

CREATE FUNCTION session.quiet_in_ms(p_quiet_at timestamp with time zone) RETURNS bigint
    LANGUAGE sql PARALLEL SAFE
    RETURN (COALESCE(GREATEST((0)::numeric, ceil((EXTRACT(epoch FROM (p_quiet_at - clock_timestamp())) * (1000)::numeric))), (0)::numeric))::bigint;

CREATE FUNCTION session.refusal(p_session uuid, p_run uuid, p_fence bigint, p_first_seq integer, p_n integer, OUT outcome smallint, OUT next_seq integer) RETURNS record
    LANGUAGE sql STABLE
    AS $$
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

CREATE FUNCTION session.refuse_while_moving() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.request_cancel(p_run uuid, p_reason text) RETURNS void
    LANGUAGE sql
    AS $$
    UPDATE session.run SET cancel_requested = true, cancel_reason = p_reason
    WHERE run_id = p_run AND NOT cancel_requested
$$;

CREATE FUNCTION session.requeue_run(p_run uuid) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.resolve_action(p_tenant uuid, p_run uuid, p_call text, p_decision integer, p_content text, p_request_id text, p_fingerprint bytea, p_time_ms bigint, p_data text) RETURNS TABLE(run session.run_view, call session.tool_call)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.run_context(p_run uuid, p_max_messages integer, p_max_bytes bigint, p_page_bytes bigint) RETURNS json
    LANGUAGE plpgsql STABLE
    AS $$
DECLARE
    v_session session.session%ROWTYPE;
    v_run session.run%ROWTYPE;
    v_history json;
    v_kept integer;
    v_written bigint;
    v_page record;
    v_approval text[];
BEGIN
    SELECT * INTO STRICT v_run FROM session.run r WHERE r.run_id = p_run;
    SELECT * INTO STRICT v_session FROM session.session s WHERE s.session_id = v_run.session_id;
    SELECT t.approval_tools INTO STRICT v_approval FROM session.tenant t
    WHERE t.tenant_id = v_session.tenant_id;
    -- Ordinals have no gap, and a run's own messages are the conversation's last: what is read is the window and
    -- the run, however long the session is.
    IF p_max_messages = 0 THEN
        SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                         created_ms)), count(*)
        INTO v_history, v_kept
        FROM session.message
        WHERE session_id = v_session.session_id AND NOT rolled_back AND ordinal = v_run.first_message - 1;
    ELSE
        WITH newest AS (
            SELECT m.*, sum(octet_length(content) + octet_length(tool_calls)) OVER (ORDER BY ordinal DESC) AS bytes
            FROM session.message m
            WHERE m.session_id = v_session.session_id AND NOT m.rolled_back
              AND m.ordinal >= v_run.first_message - p_max_messages AND m.ordinal < v_run.first_message
        )
        SELECT json_agg(json_build_array(message_id, run_id, ordinal, role, content, tool_calls, tool_call_id,
                                         created_ms) ORDER BY ordinal), count(*)
        INTO v_history, v_kept
        FROM newest WHERE bytes <= p_max_bytes;
    END IF;
    SELECT * INTO v_page FROM session.context_page(p_run, 0, 0, 0, p_page_bytes);
    IF v_run.attempt > 1 THEN
        SELECT sum(octet_length(data)) INTO v_written FROM session.event WHERE run_id = p_run;
    END IF;
    RETURN json_build_object('messages', CASE
                                 WHEN v_history IS NULL THEN v_page.messages
                                 WHEN v_page.messages IS NULL THEN v_history
                                 -- Two arrays in one.
                                 ELSE (left(v_history::text, -1) || ',' || substr(v_page.messages::text, 2))::json
                             END,
                             'events', v_page.events, 'tool_calls', v_page.tool_calls, 'next', v_page.next,
                             'written', coalesce(v_written, 0), 'user', v_session.user_name,
                             'agent', v_session.agent, 'approval_tools', v_approval,
                             'omitted', v_run.first_message - 1 - v_kept);
END $$;

CREATE FUNCTION session.say_resolved(p_run uuid) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.settle_tool_call(p_call text, p_state smallint, p_content text, p_ref text, p_tries integer) RETURNS SETOF session.tool_call
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.submit_run(p_tenant uuid, p_session uuid, p_run uuid, p_request_id text, p_fingerprint bytea, p_policy integer, p_timeout_ms bigint, p_default_timeout_ms bigint, p_input json, p_options bytea, p_model text, p_title text, p_data_head text, p_data_mid text, p_data_tail text, p_time_ms bigint, p_owner text, p_ttl interval, p_max_idle_claims integer, p_max_messages integer, p_max_bytes bigint) RETURNS TABLE(duplicate boolean, created_ms bigint, created_data text, outcome smallint, run session.run_view, fence bigint, attach integer, next_seq integer, context json)
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION session.uuid7_floor(p_time timestamp with time zone) RETURNS uuid
    LANGUAGE sql STABLE
    RETURN ((lpad(to_hex(((EXTRACT(epoch FROM p_time) * (1000)::numeric))::bigint), 12, '0'::text) || repeat('0'::text, 20)))::uuid;

CREATE FUNCTION session.write_unheld(p_run uuid, p_types text[], p_times bigint[], p_data text[]) RETURNS integer
    LANGUAGE plpgsql
    AS $$
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

CREATE TABLE session.api_key (
    key_hash text NOT NULL,
    tenant_id uuid NOT NULL,
    name text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    revoked_at timestamp with time zone,
    CONSTRAINT api_key_key_hash_check CHECK ((key_hash ~ '^[0-9a-f]{64}$'::text))
);

COMMENT ON COLUMN session.api_key.key_hash IS 'SHA-256 of the key, in hex; the key itself is not kept';

CREATE TABLE session.event_default (
    run_id uuid CONSTRAINT event_run_id_not_null NOT NULL,
    seq integer CONSTRAINT event_seq_not_null NOT NULL,
    time_ms bigint CONSTRAINT event_time_ms_not_null NOT NULL,
    tenant_id uuid CONSTRAINT event_tenant_id_not_null NOT NULL,
    session_id uuid CONSTRAINT event_session_id_not_null NOT NULL,
    fence bigint CONSTRAINT event_fence_not_null NOT NULL,
    type text CONSTRAINT event_type_not_null NOT NULL,
    data text CONSTRAINT event_data_not_null NOT NULL
);

CREATE TABLE session.gone_session (
    session_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    gone_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    try_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

COMMENT ON TABLE session.gone_session IS 'deleted sessions that may have left results in the object store';

COMMENT ON COLUMN session.gone_session.try_at IS 'not before then; ahead while somebody sees to it';

CREATE TABLE session.hermesh_migration (
    version integer NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE session.idempotency (
    tenant_id uuid NOT NULL,
    scope text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    result_id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE session.message (
    session_id uuid NOT NULL,
    message_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    run_id uuid NOT NULL,
    ordinal integer NOT NULL,
    role text NOT NULL,
    content text NOT NULL,
    tool_calls text NOT NULL,
    tool_call_id text NOT NULL,
    created_ms bigint NOT NULL,
    rolled_back boolean DEFAULT false NOT NULL
);

CREATE TABLE session.session (
    session_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    title text NOT NULL,
    metadata jsonb NOT NULL,
    agent text NOT NULL,
    user_name text NOT NULL,
    created_ms bigint NOT NULL,
    updated_ms bigint NOT NULL,
    run_count integer DEFAULT 0 NOT NULL,
    message_count integer DEFAULT 0 NOT NULL
);

CREATE VIEW session.session_view AS
 SELECT session_id,
    tenant_id,
    title,
    metadata,
    agent,
    user_name,
    created_ms,
    updated_ms,
    message_count,
    ( SELECT r.run_id
           FROM session.run r
          WHERE ((r.session_id = s.session_id) AND (r.status < 4))
          ORDER BY r.ordinal
         LIMIT 1) AS active_run_id
   FROM session.session s;

CREATE TABLE session.tenant (
    tenant_id uuid NOT NULL,
    name text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    concurrency smallint DEFAULT 1 NOT NULL,
    approval_tools text[] DEFAULT '{}'::text[] NOT NULL,
    run_timeout_ms bigint,
    CONSTRAINT tenant_concurrency_check CHECK (((concurrency >= 1) AND (concurrency <= 4))),
    CONSTRAINT tenant_run_timeout_ms_check CHECK ((run_timeout_ms > 0))
);

COMMENT ON COLUMN session.tenant.concurrency IS 'ConcurrencyPolicy of input that names none';

COMMENT ON COLUMN session.tenant.approval_tools IS 'tools whose every call a person must approve; * means all';

COMMENT ON COLUMN session.tenant.run_timeout_ms IS 'time limit of runs that set none; NULL means the service''s';

CREATE TABLE session.tenant_move (
    tenant_id uuid NOT NULL,
    state smallint NOT NULL,
    cell text NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT tenant_move_state_check CHECK (((state >= 1) AND (state <= 3)))
);

COMMENT ON TABLE session.tenant_move IS 'tenants that may not be changed here: on their way between cells, or gone';

COMMENT ON COLUMN session.tenant_move.state IS '1: leaving, 2: arriving, 3: moved away';

COMMENT ON COLUMN session.tenant_move.cell IS 'the other cell';

ALTER TABLE session.tool_call ALTER COLUMN "position" ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME session.tool_call_position_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE ONLY session.event ATTACH PARTITION session.event_default DEFAULT;

ALTER TABLE ONLY session.api_key
    ADD CONSTRAINT api_key_pkey PRIMARY KEY (key_hash);

ALTER TABLE ONLY session.event
    ADD CONSTRAINT event_pkey PRIMARY KEY (run_id, seq);

ALTER TABLE ONLY session.event_default
    ADD CONSTRAINT event_default_pkey PRIMARY KEY (run_id, seq);

ALTER TABLE ONLY session.gone_session
    ADD CONSTRAINT gone_session_pkey PRIMARY KEY (session_id);

ALTER TABLE ONLY session.hermesh_migration
    ADD CONSTRAINT hermesh_migration_pkey PRIMARY KEY (version);

ALTER TABLE ONLY session.idempotency
    ADD CONSTRAINT idempotency_pkey PRIMARY KEY (tenant_id, scope, key);

ALTER TABLE ONLY session.lease
    ADD CONSTRAINT lease_pkey PRIMARY KEY (session_id);

ALTER TABLE ONLY session.message
    ADD CONSTRAINT message_pkey PRIMARY KEY (session_id, message_id);

ALTER TABLE ONLY session.run
    ADD CONSTRAINT run_pkey PRIMARY KEY (run_id);

ALTER TABLE ONLY session.run
    ADD CONSTRAINT run_session_id_ordinal_key UNIQUE (session_id, ordinal);

ALTER TABLE ONLY session.session
    ADD CONSTRAINT session_pkey PRIMARY KEY (session_id);

ALTER TABLE ONLY session.tenant_move
    ADD CONSTRAINT tenant_move_pkey PRIMARY KEY (tenant_id);

ALTER TABLE ONLY session.tenant
    ADD CONSTRAINT tenant_name_key UNIQUE (name);

ALTER TABLE ONLY session.tenant
    ADD CONSTRAINT tenant_pkey PRIMARY KEY (tenant_id);

ALTER TABLE ONLY session.tool_call
    ADD CONSTRAINT tool_call_pkey PRIMARY KEY (call_id);

CREATE INDEX gone_session_by_age ON session.gone_session USING btree (gone_at);

CREATE INDEX idempotency_by_age ON session.idempotency USING btree (created_at);

CREATE UNIQUE INDEX message_by_ordinal ON session.message USING btree (session_id, ordinal) WHERE (NOT rolled_back);

CREATE INDEX run_cancelling ON session.run USING btree (session_id) WHERE ((status = ANY (ARRAY[1, 2])) AND cancel_requested);

CREATE INDEX run_due ON session.run USING btree (tenant_id, dispatch_after) WHERE ((status = ANY (ARRAY[1, 2])) AND (dispatch_after IS NOT NULL));

CREATE INDEX run_overdue ON session.run USING btree (deadline) WHERE ((status = ANY (ARRAY[1, 2])) AND (deadline IS NOT NULL));

CREATE INDEX run_unfinished ON session.run USING btree (session_id, ordinal) WHERE (status < 4);

CREATE INDEX run_waiting ON session.run USING btree (tenant_id, run_id) WHERE (status = 3);

CREATE INDEX session_by_update ON session.session USING btree (tenant_id, updated_ms DESC, session_id DESC);

CREATE INDEX session_by_user ON session.session USING btree (tenant_id, user_name, updated_ms DESC, session_id DESC);

CREATE INDEX tool_call_by_run ON session.tool_call USING btree (run_id);

CREATE INDEX tool_call_by_session ON session.tool_call USING btree (session_id);

ALTER INDEX session.event_pkey ATTACH PARTITION session.event_default_pkey;

CREATE TRIGGER note_gone_session BEFORE DELETE ON session.session FOR EACH ROW EXECUTE FUNCTION session.note_gone_session();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.api_key FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.idempotency FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.message FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.run FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.session FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.tenant FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR DELETE OR UPDATE ON session.tool_call FOR EACH ROW EXECUTE FUNCTION session.refuse_while_moving();

ALTER TABLE ONLY session.api_key
    ADD CONSTRAINT api_key_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES session.tenant(tenant_id) ON DELETE CASCADE;

ALTER TABLE ONLY session.lease
    ADD CONSTRAINT lease_session_id_fkey FOREIGN KEY (session_id) REFERENCES session.session(session_id) ON DELETE CASCADE;

ALTER TABLE ONLY session.message
    ADD CONSTRAINT message_session_id_fkey FOREIGN KEY (session_id) REFERENCES session.session(session_id) ON DELETE CASCADE;

ALTER TABLE ONLY session.run
    ADD CONSTRAINT run_session_id_fkey FOREIGN KEY (session_id) REFERENCES session.session(session_id) ON DELETE CASCADE;

ALTER TABLE ONLY session.session
    ADD CONSTRAINT session_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES session.tenant(tenant_id) ON DELETE CASCADE;

ALTER TABLE ONLY session.tool_call
    ADD CONSTRAINT tool_call_session_id_fkey FOREIGN KEY (session_id) REFERENCES session.session(session_id) ON DELETE CASCADE;
