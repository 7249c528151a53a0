-- Notes how far the ingestion of one file has come, if it still is wanted.
--
-- KEYS[1]  shoal:{tenant}:vs:<store>:files      hash: file id -> record (JSON of StoreFileRecord)
-- KEYS[2]  shoal:{tenant}:vs:<store>:progress   hash: file id -> share of embedded chunks
-- ARGV[1]  file id    ARGV[2]  revision of the attachment    ARGV[3]  share, 0 to 1
--
-- Returns 1, or 0 when the file was removed, cancelled or attached anew.

local raw = redis.call('HGET', KEYS[1], ARGV[1])
if not raw then return 0 end
local record = cjson.decode(raw)
if record.revision ~= ARGV[2] or record.status ~= 'in_progress' then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return 1
