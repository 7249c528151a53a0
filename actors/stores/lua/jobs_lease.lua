-- Gives jobs to one runner: what is due again, what a dead runner left, what is new, in this order.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream    as in jobs_enqueue.lua
-- KEYS[2]  shoal:{jobs:<kind>}:delayed   zset: job ids by when they are due, in ms
-- ARGV[1]  shoal:{jobs:<kind>}:          prefix of job:<job> (hash) and serial:<tenant>:<serial> (string: job id,
--                                        the only one of its serial that may run; expires with the lease)
-- ARGV[2]  group    ARGV[3]  consumer    ARGV[4]  most jobs
-- ARGV[5]  ms without heartbeat after which a lease is another runner's to take
-- ARGV[6]  ms until a job whose serial is taken is tried again
--
-- Returns {last entry id, ms until the next delayed job is due or -1, 1 when nothing is left to take or 0,
--          {job, entry, tenant, payload, serial, epoch, attempts, deaths, failures, unforeseen,
--           age in ms}, ...}.

local stream, delayed, prefix = KEYS[1], KEYS[2], ARGV[1]
local group, consumer, most, stale = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

for _, job in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', delayed, job)
  if redis.call('EXISTS', prefix .. 'job:' .. job) == 1 then
    redis.call('HSET', prefix .. 'job:' .. job, 'entry', redis.call('XADD', stream, '*', 'job', job))
  end
end

-- XPENDING and not XAUTOCLAIM: that one looks at ten entries per job asked for, and may never reach a stale one.
local left = redis.pcall('XPENDING', stream, group, 'IDLE', stale, '-', '+', most)
if left.err then -- the group is missing: a new or emptied server
  redis.call('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
  left = {}
end

local leases = {}
local function take(entry, died)
  local id, job = entry[1], entry[2][2]
  local key = prefix .. 'job:' .. job
  local fields = redis.call('HMGET', key, 'tenant', 'payload', 'serial', 'enqueued_ms', 'state')
  local open = fields[5] == 'waiting' or fields[5] == 'leased'
  -- A runner that died between reading and taking did not touch the job: that is no death of the job's making.
  if died and fields[5] == 'leased' then redis.call('HINCRBY', key, 'deaths', 1) end
  if not open then
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
    return
  end
  if fields[3] ~= '' then
    local serial = prefix .. 'serial:' .. fields[1] .. ':' .. fields[3]
    local owner = redis.call('GET', serial)
    if owner and owner ~= job then
      redis.call('XACK', stream, group, id)
      redis.call('XDEL', stream, id)
      redis.call('ZADD', delayed, now + ARGV[6], job)
      redis.call('HSET', key, 'state', 'waiting')
      return
    end
    redis.call('SET', serial, job, 'PX', stale)
  end
  redis.call('HSET', key, 'state', 'leased')
  local epoch, attempts = redis.call('HINCRBY', key, 'epoch', 1), redis.call('HINCRBY', key, 'attempts', 1)
  local counts = redis.call('HMGET', key, 'deaths', 'failures', 'unforeseen')
  leases[#leases + 1] = {job, id, fields[1], fields[2], fields[3], epoch, attempts, tonumber(counts[1]),
    tonumber(counts[2]), tonumber(counts[3]), math.max(0, now - fields[4])}
end

for _, pending in ipairs(left) do
  local claimed = redis.call('XCLAIM', stream, group, consumer, stale, pending[1])
  if claimed[1] and claimed[1][2] then take(claimed[1], true) end
end
local drained = 0
if #leases < most then
  local wanted = most - #leases
  local fresh = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', wanted, 'STREAMS', stream, '>')
  if fresh then
    for _, entry in ipairs(fresh[1][2]) do take(entry, false) end
  end
  if not fresh or #fresh[1][2] < wanted then drained = 1 end
end

local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
local due = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
return {last[1] and last[1][1] or '0-0', due[2] and math.max(0, due[2] - now) or -1, drained, leases}
