-- Cancels a background response, whoever has it: its owner can write nothing from here on.
--
-- KEYS[1]  shoal:{jobs:response}:job:<job>    KEYS[2]  shoal:{jobs:response}:log:<tenant>:<job>
-- KEYS[3]  shoal:{jobs:response}:record:<tenant>:<job>    KEYS[4]  shoal:{jobs:response}:stream
-- KEYS[5]  shoal:{jobs:response}:delayed      all as in responses_append.lua and jobs_lease.lua
-- KEYS[6]  shoal:{jobs:response}:cancelled    channel: job ids, for the runners
-- ARGV[1]  group    ARGV[2]  job id    ARGV[3]  the last fact
--
-- Returns 1, or 0 when it has ended already or there is no such job.

local fields = redis.call('HMGET', KEYS[1], 'state', 'entry')
if fields[1] ~= 'waiting' and fields[1] ~= 'leased' then return 0 end
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'state', 'cancelled')
redis.call('XACK', KEYS[4], ARGV[1], fields[2])
redis.call('XDEL', KEYS[4], fields[2])
redis.call('ZREM', KEYS[5], ARGV[2])
local length = redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('PUBLISH', KEYS[2], (length - 1) .. ' ' .. ARGV[3])
redis.call('PUBLISH', KEYS[6], ARGV[2])
local keep_s = redis.call('HGET', KEYS[3], 'keep_s') or 60
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], keep_s) end
return 1
