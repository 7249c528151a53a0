-- Writes a job, unless its idempotency key was used before.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream        stream: entries (job = job id), oldest first; group "runners"
-- KEYS[2]  shoal:{jobs:<kind>}:job:<job>     hash: tenant, payload, serial, state, entry, epoch, attempts, deaths,
--                                            failures (of them unforeseen), enqueued_ms, error
-- KEYS[3]  shoal:{jobs:<kind>}:once:<tenant>:<idempotency key>   string: job id; KEYS[2] again for none
-- KEYS[4]  shoal:{jobs:<kind>}:record:<tenant>:<job>   hash that is written with the job; KEYS[2] again for none
-- ARGV[1]  job id    ARGV[2]  tenant    ARGV[3]  payload (msgpack)    ARGV[4]  serial, '' for none
-- ARGV[5]  seconds that an idempotency key is remembered
-- ARGV[6...]  fields and values of KEYS[4]
--
-- Returns the job id: of the new job, or of the one that the key belongs to.

local once = KEYS[3] ~= KEYS[2]
if once then
  local known = redis.call('GET', KEYS[3])
  if known then return known end
  redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[5])
end
local clock = redis.call('TIME')
local entry = redis.call('XADD', KEYS[1], '*', 'job', ARGV[1])
redis.call('HSET', KEYS[2], 'tenant', ARGV[2], 'payload', ARGV[3], 'serial', ARGV[4], 'state', 'waiting',
  'entry', entry, 'epoch', 0, 'attempts', 0, 'deaths', 0, 'failures', 0, 'unforeseen', 0,
  'enqueued_ms', clock[1] * 1000 + math.floor(clock[2] / 1000))
if KEYS[4] ~= KEYS[2] then redis.call('HSET', KEYS[4], unpack(ARGV, 6)) end
return ARGV[1]
