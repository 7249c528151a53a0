-- Notes that a vector store is used, which puts off its expiry, and tells its generation.
--
-- KEYS[1]  shoal:{tenant}:vs:<store>   hash: expires_after_s ('' for never), last_active_at, generation
--
-- Returns the generation, -1 when there is no such store, -2 when it has expired.

local fields = redis.call('HMGET', KEYS[1], 'generation', 'last_active_at', 'expires_after_s')
if not fields[1] then return -1 end
local now = tonumber(redis.call('TIME')[1])
local after = tonumber(fields[3])
if after and now >= tonumber(fields[2]) + after then return -2 end
redis.call('HSET', KEYS[1], 'last_active_at', now)
return tonumber(fields[1])
