-- Whose request it is, by the public tag of its API key (hm_TAG_SECRET) or of the chat page's cookie (TAG.sealed).
-- A gateway looks at no cookie where there is a key, so a key without a tag counts as none.

local function of_key(value)
  local scheme, key = value:match("^(%a+) +(.*)$")
  if not scheme or scheme:lower() ~= "bearer" then
    return nil
  end
  return key:match("^hm_([a-z0-9][a-z0-9-]*)_.") or ""
end

local function of_cookie(value)
  local sealed = (" " .. value):match("[; ]hermesh_login=([^;]*)")
  return sealed and sealed:match("^([a-z0-9][a-z0-9-]*)%.") or ""
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local tag = of_key(headers:get("authorization") or "") or of_cookie(headers:get("cookie") or "")
  if tag == "" or #tag > 32 then
    tag = "-"
  end
  -- In place of whatever a client sent by this name. The route was found before, and is looked for again.
  headers:replace("x-hermesh-tag", tag)
  handle:clearRouteCache()
end
