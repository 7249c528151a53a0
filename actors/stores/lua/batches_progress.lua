-- Notes what has become of lines of a batch and, at its end, ends its job: one step, for the owner only.
--
-- KEYS[1]  shoal:{jobs:batch}:job:<job>              as in jobs_enqueue.lua
-- KEYS[2]  shoal:{jobs:batch}:record:<tenant>:<job>  hash: head (JSON), status, total, completed, failed, <state>_at,
--                                                    errors (JSON), output_file_id, error_file_id, end (the last
--                                                    status, once the files are written), keep_s
-- KEYS[3]  shoal:{jobs:batch}:parts:<tenant>:<job>   set: names of the files that hold results
-- KEYS[4]  shoal:{jobs:batch}:done:<tenant>:<job>    bitmap: lines whose result stands in one of them
-- KEYS[5]  shoal:{jobs:batch}:stream    KEYS[6]  shoal:{jobs:batch}:dead    as in jobs_finish.lua
-- ARGV[1]  epoch of the lease    ARGV[2]  group    ARGV[3]  entry of the job in its stream    ARGV[4]  job id
-- ARGV[5]  '', or the outcome of the job: 'done' or 'dead'    ARGV[6]  error    ARGV[7]  longest list of dead letters
-- ARGV[8]  name of a part, '' for none    ARGV[9]  lines in it that were answered    ARGV[10]  that failed
-- ARGV[11] number of fields and values    ARGV[12...]  fields and values of KEYS[2], then the part's lines
--
-- A status other than the last one never replaces 'cancelling'. A part that is noted already changes nothing.
-- Returns the status of the batch; nothing when the lease is lost.

local fields = redis.call('HMGET', KEYS[1], 'epoch', 'state')
if fields[1] ~= ARGV[1] then return false end
local status = redis.call('HGET', KEYS[2], 'status')
if fields[2] == 'done' or fields[2] == 'dead' then return status end
if fields[2] ~= 'leased' or not status then return false end

local count = tonumber(ARGV[11])
if ARGV[8] ~= '' and redis.call('SADD', KEYS[3], ARGV[8]) == 1 then
  redis.call('HINCRBY', KEYS[2], 'completed', ARGV[9])
  redis.call('HINCRBY', KEYS[2], 'failed', ARGV[10])
  for i = 12 + count, #ARGV do redis.call('SETBIT', KEYS[4], ARGV[i], 1) end
end
for i = 12, 11 + count, 2 do
  if ARGV[i] ~= 'status' or ARGV[5] ~= '' or status ~= 'cancelling' then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
if ARGV[5] ~= '' then
  redis.call('XACK', KEYS[5], ARGV[2], ARGV[3])
  redis.call('XDEL', KEYS[5], ARGV[3])
  redis.call('HSET', KEYS[1], 'state', ARGV[5], 'error', ARGV[6])
  if ARGV[5] == 'dead' then
    local clock = redis.call('TIME')
    redis.call('ZADD', KEYS[6], clock[1] * 1000 + math.floor(clock[2] / 1000), ARGV[4])
    redis.call('ZREMRANGEBYRANK', KEYS[6], 0, -ARGV[7] - 1)
  end
  local keep_s = redis.call('HGET', KEYS[2], 'keep_s') or 60
  for i = 1, 4 do redis.call('EXPIRE', KEYS[i], keep_s) end
end
return redis.call('HGET', KEYS[2], 'status')
