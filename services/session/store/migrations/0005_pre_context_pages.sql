-- A claim's context in pages, so that no answer grows with its run; and claims that only throw text away count as
-- claims that moved nothing.

-- One page of what a run itself has stored and a takeover needs, after a position (a message's ordinal, a call's
-- position, an event's seq): its messages; then its calls that no message answers yet; then the events from its last
-- step.started on (all but the first if it has none) that tell how far the turn got. A page holds p_bytes and at
-- most one item more (NULL: everything), and "next" is the position after it, null after the last page.
-- A result is in a message or in a call, and an event that repeats it comes without; of reasoning only the place
-- counts, and of progress nothing.
CREATE FUNCTION session.context_page(p_run uuid, p_message integer, p_call integer, p_event integer, p_bytes bigint,
                                     OUT messages json, OUT tool_calls json, OUT events json, OUT next json)
LANGUAGE plpgsql STABLE AS $$
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

-- What an agent needs to go on with a run, as JSON: the newest messages before the run's own within the limits,
-- the first page of its own (see context_page), the session's user and agent, how many bytes its log has. The
-- history is cut where the run begins, so that a takeover gives the model the same as the first claim did.
-- Callers that have the history in a cache ask with p_max_messages = 0: then it holds the one message before the
-- run's own, whose id and ordinal tell which history fits.
DROP FUNCTION session.run_context(uuid, integer, bigint);
CREATE FUNCTION session.run_context(p_run uuid, p_max_messages integer, p_max_bytes bigint, p_page_bytes bigint)
RETURNS json LANGUAGE plpgsql STABLE AS $$
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

-- Whether a run came further since a claim. What every attempt writes before it gets anywhere does not say so. Nor do
-- signs of life of a tool, nor text that was written after other text was thrown away: the next attempt begins the
-- turn anew just as this one did.
CREATE FUNCTION session.made_progress(p_run uuid, p_claim_seq integer) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN EXISTS (
        SELECT FROM session.event e WHERE e.run_id = p_run AND e.seq >= p_claim_seq
        AND e.type NOT IN ('run.created', 'run.started', 'step.started', 'attempt.reset', 'context.degraded',
                           'memory.recalled', 'tool.progress', 'tool.reconciled', 'text.delta', 'reasoning.delta'))
    OR EXISTS (
        SELECT FROM session.event e WHERE e.run_id = p_run AND e.seq >= p_claim_seq
        AND e.type IN ('text.delta', 'reasoning.delta')
        AND NOT EXISTS (SELECT FROM session.event o WHERE o.run_id = p_run AND o.seq >= p_claim_seq
                        AND o.type = 'attempt.reset'));

-- Takes the lease of a run for an owner: the only arbiter of who runs it. Outcomes are ClaimOutcome's:
-- 1 claimed, 2 held by another or not its turn, 3 finished (before, or by this call), 4 waits for a person.
-- At the first claim the run's input becomes part of the conversation: its place there is its turn. From then
-- on its time runs, whoever holds it, and a claim that comes too late ends it.
-- Who has the lease may claim again, under a new fence: it asks because the first answer was lost, and so nobody
-- works on the run. That counts as no claim of its own.
-- What its context holds beside the conversation's history is cut at p_page_bytes; the rest is read by pages.
CREATE FUNCTION session.claim_run(p_run uuid, p_owner text, p_ttl interval, p_max_idle_claims integer,
                                  p_max_messages integer, p_max_bytes bigint, p_page_bytes bigint)
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

-- A claim whose context has no bound: of new runs, which have nothing but their input, and of the version before.
CREATE OR REPLACE FUNCTION session.claim_run(p_run uuid, p_owner text, p_ttl interval, p_max_idle_claims integer,
                                             p_max_messages integer, p_max_bytes bigint)
RETURNS TABLE (outcome smallint, run session.run_view, fence bigint, attach integer, next_seq integer,
               context json)
LANGUAGE sql AS $$
    SELECT * FROM session.claim_run(p_run, p_owner, p_ttl, p_max_idle_claims, p_max_messages, p_max_bytes, NULL)
$$;
