-- Puts a dead letter back into the log, as new.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream    KEYS[2]  shoal:{jobs:<kind>}:job:<job>, as in jobs_enqueue.lua
-- KEYS[3]  shoal:{jobs:<kind>}:dead      as in jobs_finish.lua
-- KEYS[4]  shoal:{jobs:<kind>}:record:<tenant>:<job>   as in jobs_enqueue.lua; may be missing
-- KEYS[5]  shoal:{jobs:<kind>}:log:<tenant>:<job>      as in responses_append.lua; may be missing
-- ARGV[1]  job id
--
-- Returns 1, or 0 when it is no dead letter.

if redis.call('HGET', KEYS[2], 'state') ~= 'dead' then return 0 end
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('DEL', KEYS[5])
redis.call('PERSIST', KEYS[2])
redis.call('PERSIST', KEYS[4])
local clock = redis.call('TIME')
redis.call('HSET', KEYS[2], 'state', 'waiting', 'entry', redis.call('XADD', KEYS[1], '*', 'job', ARGV[1]),
  'attempts', 0, 'deaths', 0, 'failures', 0, 'unforeseen', 0, 'error', '',
  'enqueued_ms', clock[1] * 1000 + math.floor(clock[2] / 1000))
return 1
