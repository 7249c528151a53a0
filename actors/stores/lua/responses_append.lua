-- Adds facts to the log of a background response and, with the last of them, ends its job: one step, for the owner only.
--
-- KEYS[1]  shoal:{jobs:response}:job:<job>              as in jobs_enqueue.lua
-- KEYS[2]  shoal:{jobs:response}:log:<tenant>:<job>     list: facts (msgpack); also the channel that carries them
-- KEYS[3]  shoal:{jobs:response}:record:<tenant>:<job>  as in jobs_enqueue.lua
-- KEYS[4]  shoal:{jobs:response}:stream    KEYS[5]  shoal:{jobs:response}:dead    as in jobs_finish.lua
-- ARGV[1]  epoch of the lease    ARGV[2]  entries that the owner believes are in the log
-- ARGV[3]  '', or the outcome of the job: 'done' or 'dead'
-- ARGV[4]  group    ARGV[5]  entry of the job in its stream    ARGV[6]  job id
-- ARGV[7]  error, '' for none    ARGV[8]  longest list of dead letters
-- ARGV[9...]  facts
--
-- Channel KEYS[2]: "<index> <fact>" for each.
-- Returns {what, entries}: what is 1: written, 0: the lease is lost, 2: the log has another length, nothing was
-- written, 3: this owner has ended it before.

local fields = redis.call('HMGET', KEYS[1], 'epoch', 'state')
local length = redis.call('LLEN', KEYS[2])
if fields[1] ~= ARGV[1] then return {0, length} end
if fields[2] == 'done' or fields[2] == 'dead' then return {3, length} end
if fields[2] ~= 'leased' then return {0, length} end
if length ~= tonumber(ARGV[2]) then return {2, length} end

for i = 9, #ARGV do
  redis.call('RPUSH', KEYS[2], ARGV[i])
  redis.call('PUBLISH', KEYS[2], length .. ' ' .. ARGV[i])
  length = length + 1
end
if ARGV[3] == '' then return {1, length} end

redis.call('XACK', KEYS[4], ARGV[4], ARGV[5])
redis.call('XDEL', KEYS[4], ARGV[5])
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'error', ARGV[7])
if ARGV[3] == 'dead' then
  local clock = redis.call('TIME')
  redis.call('ZADD', KEYS[5], clock[1] * 1000 + math.floor(clock[2] / 1000), ARGV[6])
  redis.call('ZREMRANGEBYRANK', KEYS[5], 0, -ARGV[8] - 1)
end
local keep_s = redis.call('HGET', KEYS[3], 'keep_s') or 60
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], keep_s) end
return {1, length}
