-- Asks the owner of a batch to end it with what there is; whoever gets the job next does so, too.
--
-- KEYS[1]  shoal:{jobs:batch}:record:<tenant>:<job>, as in batches_progress.lua
-- ARGV[1]  unix seconds
--
-- Returns 1, or 0 when it has ended or is about to.

local status = redis.call('HGET', KEYS[1], 'status')
if status == 'cancelling' then return 1 end
if status ~= 'validating' and status ~= 'in_progress' then return 0 end
redis.call('HSET', KEYS[1], 'status', 'cancelling', 'cancelling_at', ARGV[1])
return 1
