-- Daily partitions of the log. A UUIDv7 begins with its time, so a range of ids is a range of time, and the
-- primary key (run_id, seq) can hold the partition key.

CREATE FUNCTION session.uuid7_floor(p_time timestamptz) RETURNS uuid
    LANGUAGE sql STABLE
    RETURN (lpad(to_hex((extract(epoch FROM p_time) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- Makes the partitions of yesterday up to p_ahead days from now where they are missing, and drops those
-- whose every run was made before p_retention ago. Returns how many were made and dropped. One caller at a
-- time: another one that comes meanwhile does nothing.
CREATE FUNCTION session.maintain_partitions(p_ahead integer, p_retention interval,
                                            OUT made integer, OUT dropped integer)
LANGUAGE plpgsql AS $$
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
END $$;

SELECT session.maintain_partitions(7, interval '30 days');
