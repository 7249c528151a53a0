-- Charges or gives back the difference between what was used and what was reserved.
--
-- KEYS[i]           shoal:{tenant}:limit:<owner>:<unit>   as in limits_reserve.lua
-- ARGV[1]           period in microseconds
-- ARGV[2i, 2i + 1]  limit per period (>= 1) and difference (used minus reserved, may be negative) of KEYS[i]
--
-- Returns nothing. The formulas are those of actors/policies/limits.py (`settle`), where they are explained.

local period = tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

for i, key in ipairs(KEYS) do
  local limit, difference = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local tat = math.max(tonumber(redis.call('GET', key) or '0'), now)
  tat = math.min(tat, now + 2 * period) + difference * period / limit
  local ahead = math.min(tat - now, 2 * period)
  if ahead <= 0 then
    redis.call('DEL', key)
  else
    redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
  end
end
