-- Replaces one file's record in a vector store, if it still is what the caller read (compare and swap).
-- Run by actors/stores/catalog_swaps.py.
--
-- KEYS[1]  shoal:{tenant}:vs:<store>     hash: record, generation, usage_bytes, last_active_at
-- KEYS[2]  KEYS[1]:files                 hash: file id -> record (JSON of StoreFileRecord)
-- KEYS[3]  KEYS[1]:order                 zset: file id by sequence number of its attachment
-- KEYS[4]  KEYS[1]:published             zset: the file ids with a published version, by the same number
-- KEYS[5]  KEYS[1]:progress              hash: file id -> share of embedded chunks
-- KEYS[6]  KEYS[1]:removed               zset: removed file ids, so that cursors on them keep working
-- KEYS[7]  shoal:{tenant}:file:<file>:stores   set: the vector stores that the file is in
-- KEYS[8]  shoal:{tenant}:sequence       counter behind every order
-- KEYS[9-12] KEYS[1]:status:<status>     zset per status: file ids by the same number
-- ARGV[1]  file id          ARGV[2]  store id
-- ARGV[3]  the record that was read, '' for none
-- ARGV[4]  the new record, '' to remove it
-- ARGV[5]  index (1-4) of the new record's status, 0 for none
-- ARGV[6]  1: searches now find something else, so the generation grows
-- ARGV[7]  longest list of removed ids
--
-- Returns 'no_store', 'changed' or 'done'.

local id, old, new = ARGV[1], ARGV[3], ARGV[4]
if redis.call('EXISTS', KEYS[1]) == 0 then return 'no_store' end
if (redis.call('HGET', KEYS[2], id) or '') ~= old then return 'changed' end

local place = redis.call('ZSCORE', KEYS[3], id)
if not place then place = redis.call('INCR', KEYS[8]) end
local before = old ~= '' and cjson.decode(old) or {usage_bytes = 0}
local after = new ~= '' and cjson.decode(new) or {usage_bytes = 0, version = ''}

for i = 9, 12 do redis.call('ZREM', KEYS[i], id) end
if new == '' then
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  redis.call('SREM', KEYS[7], ARGV[2])
  redis.call('ZADD', KEYS[6], place, id)
  redis.call('ZREMRANGEBYRANK', KEYS[6], 0, -tonumber(ARGV[7]) - 1)
else
  redis.call('HSET', KEYS[2], id, new)
  redis.call('ZADD', KEYS[3], place, id)
  redis.call('SADD', KEYS[7], ARGV[2])
  redis.call('ZREM', KEYS[6], id)
  redis.call('ZADD', KEYS[8 + tonumber(ARGV[5])], place, id)
end
if after.status ~= 'in_progress' or before.revision ~= after.revision then redis.call('HDEL', KEYS[5], id) end
if after.version ~= '' then redis.call('ZADD', KEYS[4], place, id) else redis.call('ZREM', KEYS[4], id) end

redis.call('HINCRBY', KEYS[1], 'usage_bytes', after.usage_bytes - before.usage_bytes)
if ARGV[6] == '1' then redis.call('HINCRBY', KEYS[1], 'generation', 1) end
redis.call('HSET', KEYS[1], 'last_active_at', redis.call('TIME')[1])
return 'done'
