-- As in 0003, and: 4 (send it again) if what refused the append is over by the time of this look. The place
-- may have come to match meanwhile, and a writer must not take that for a lost lease.
CREATE OR REPLACE FUNCTION session.refusal(p_session uuid, p_run uuid, p_fence bigint, p_first_seq integer,
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
