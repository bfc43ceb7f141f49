-- A tenant that is on its way to another cell, or was moved there, changes nothing here any more; as in the session
-- service's schema.

CREATE TABLE memory.tenant_move (
    tenant_id uuid PRIMARY KEY,
    -- 1: leaving, 2: arriving, 3: moved away.
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 3),
    cell text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE memory.tenant_move IS 'tenants that may not be changed here: on their way between cells, or gone';
COMMENT ON COLUMN memory.tenant_move.state IS '1: leaving, 2: arriving, 3: moved away';
COMMENT ON COLUMN memory.tenant_move.cell IS 'the other cell';

-- VOLATILE: its look at tenant_move is as of now and not as of the statement that fired it. Whoever moves the tenant
-- names it in hermesh.moving, for a transaction.
CREATE FUNCTION memory.refuse_while_moving() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    v_tenant uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.tenant_id ELSE NEW.tenant_id END;
    v_state smallint;
BEGIN
    SELECT m.state INTO v_state FROM memory.tenant_move m WHERE m.tenant_id = v_tenant;
    IF v_state IS NOT NULL AND current_setting('hermesh.moving', true) IS DISTINCT FROM v_tenant::text THEN
        RAISE EXCEPTION '%', CASE v_state WHEN 3 THEN 'TENANT_MOVED' ELSE 'TENANT_MOVING' END
        USING ERRCODE = 'HM503';
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON memory.item
FOR EACH ROW EXECUTE FUNCTION memory.refuse_while_moving();
CREATE TRIGGER refuse_while_moving BEFORE INSERT OR UPDATE OR DELETE ON memory.preference
FOR EACH ROW EXECUTE FUNCTION memory.refuse_while_moving();
