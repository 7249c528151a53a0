-- Counts what is not done.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream    KEYS[2]  shoal:{jobs:<kind>}:delayed, as in jobs_lease.lua
-- ARGV[1]  group
--
-- Returns {entries in the stream, of them leased, delayed, age in ms of the oldest that no runner has}.

local stream = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local leased, last = 0, '0-0'
if redis.call('EXISTS', stream) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local fields = {}
    for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
    if fields['name'] == ARGV[1] then leased, last = fields['pending'], fields['last-delivered-id'] end
  end
end
local oldest = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)
local age = oldest[1] and math.max(0, now - string.match(oldest[1][1], '^%d+')) or 0
return {redis.call('XLEN', stream), leased, redis.call('ZCARD', KEYS[2]), age}
