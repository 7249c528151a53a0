-- Takes a cost from every bucket, or from none.
--
-- KEYS[i]           shoal:{tenant}:limit:<owner>:<unit>   string: theoretical arrival time (GCRA) in microseconds
--                   of server time; absent means a full bucket. Expires when the bucket is full again.
-- ARGV[1]           period in microseconds
-- ARGV[2i, 2i + 1]  limit per period (>= 1) and cost (<= limit) of KEYS[i]
--
-- Returns {refusing bucket's index or 0, wait in microseconds, remaining_1, reset_1 in microseconds, remaining_2, ...}.
-- The formulas are those of actors/policies/limits.py (`take`), where they are explained.

local period = tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

local before, after, refused, longest = {}, {}, 0, 0
for i, key in ipairs(KEYS) do
  local limit, cost = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local tat = tonumber(redis.call('GET', key) or '0')
  before[i] = math.min(math.max(tat, now), now + 2 * period)
  after[i] = before[i] + cost * period / limit
  local wait = after[i] - period - now
  if wait > 1 and wait > longest then
    refused, longest = i, wait
  end
end

local answer = {refused, math.ceil(longest)}
for i, key in ipairs(KEYS) do
  local limit = tonumber(ARGV[2 * i])
  local tat = refused == 0 and after[i] or before[i]
  local ahead = tat - now
  if refused == 0 and ahead > 0 then
    redis.call('SET', key, string.format('%.3f', tat), 'PX', math.ceil(ahead / 1000) + 1)
  end
  answer[#answer + 1] = math.max(0, math.floor((period - ahead) * limit / period + 0.001))
  answer[#answer + 1] = math.ceil(ahead)
end
return answer
