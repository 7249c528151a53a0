-- Ends one lease: acknowledges its entry and says what becomes of the job, in one step.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream      KEYS[2]  shoal:{jobs:<kind>}:job:<job>, as in jobs_enqueue.lua
-- KEYS[3]  shoal:{jobs:<kind>}:serial:<tenant>:<serial>, as in jobs_lease.lua; KEYS[2] again for none
-- KEYS[4]  shoal:{jobs:<kind>}:delayed     zset: job ids by when they are due, in ms
-- KEYS[5]  shoal:{jobs:<kind>}:dead        zset: dead-lettered job ids by when they died, in ms
-- ARGV[1]  group    ARGV[2]  entry    ARGV[3]  epoch of the lease    ARGV[4]  job id
-- ARGV[5]  'done', 'dead', 'retry', or 'release': as retry, at once and without a failure
-- ARGV[6]  done: seconds that the job can still be looked up; retry: delay in ms
-- ARGV[7]  error, '' for none
-- ARGV[8]  longest list of dead letters
-- ARGV[9]  retry: 1 when nobody foresaw such a failure, else 0
--
-- Returns 1, or 0 when the lease is lost: nothing was done.

local fields = redis.call('HMGET', KEYS[2], 'epoch', 'state')
if fields[1] ~= ARGV[3] or fields[2] ~= 'leased' then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
if KEYS[3] ~= KEYS[2] and redis.call('GET', KEYS[3]) == ARGV[4] then redis.call('DEL', KEYS[3]) end
redis.call('HSET', KEYS[2], 'error', ARGV[7])

if ARGV[5] == 'retry' then
  redis.call('HSET', KEYS[2], 'state', 'waiting')
  redis.call('HINCRBY', KEYS[2], 'failures', 1)
  redis.call('HINCRBY', KEYS[2], 'unforeseen', ARGV[9])
  redis.call('ZADD', KEYS[4], now + ARGV[6], ARGV[4])
elseif ARGV[5] == 'release' then
  redis.call('HSET', KEYS[2], 'state', 'waiting')
  redis.call('ZADD', KEYS[4], now, ARGV[4])
elseif ARGV[5] == 'dead' then
  redis.call('HSET', KEYS[2], 'state', 'dead')
  redis.call('ZADD', KEYS[5], now, ARGV[4])
  redis.call('ZREMRANGEBYRANK', KEYS[5], 0, -ARGV[8] - 1)
else
  redis.call('HSET', KEYS[2], 'state', 'done')
  redis.call('EXPIRE', KEYS[2], ARGV[6])
end
return 1
