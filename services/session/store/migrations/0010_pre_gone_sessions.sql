-- Deleted sessions whose large tool results are still in the object store. A session's id never comes back, so what
-- is stored under it may be deleted at any time once it is here. In a trigger, because a tenant's end deletes its
-- sessions as well, and because earlier versions delete sessions beside this one.

CREATE TABLE session.gone_session (
    session_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    gone_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    try_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX gone_session_by_age ON session.gone_session (gone_at);
COMMENT ON TABLE session.gone_session IS 'deleted sessions that may have left results in the object store';
COMMENT ON COLUMN session.gone_session.try_at IS 'not before then; ahead while somebody sees to it';

-- Which of its calls have large results is not asked: one may have been stored, and its outcome never recorded.
CREATE FUNCTION session.note_gone_session() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM session.tool_call c WHERE c.session_id = OLD.session_id) THEN
        INSERT INTO session.gone_session (session_id, tenant_id) VALUES (OLD.session_id, OLD.tenant_id)
        ON CONFLICT (session_id) DO NOTHING;
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER note_gone_session BEFORE DELETE ON session.session
    FOR EACH ROW EXECUTE FUNCTION session.note_gone_session();
