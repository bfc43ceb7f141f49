-- name: get_preferences
-- A user's preferences, one JSON object. $1 tenant, $2 user.
SELECT preferences FROM memory.preference WHERE tenant_id = $1 AND user_name = $2;

-- name: set_preferences
-- Merges changes in; a null value removes its key. No row if there would be more than $4 keys.
-- $1 tenant, $2 user, $3 changes, $4 most keys.
INSERT INTO memory.preference AS kept (tenant_id, user_name, preferences)
VALUES ($1, $2, jsonb_strip_nulls($3::jsonb))
ON CONFLICT (tenant_id, user_name) DO UPDATE
SET preferences = jsonb_strip_nulls(kept.preferences || $3::jsonb), updated_at = clock_timestamp()
WHERE (
    SELECT count(*) FROM jsonb_object_keys(jsonb_strip_nulls(kept.preferences || $3::jsonb))
) <= $4::bigint
RETURNING preferences;
