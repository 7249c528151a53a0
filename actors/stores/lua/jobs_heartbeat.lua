-- Renews one lease.
--
-- KEYS[1]  shoal:{jobs:<kind>}:stream      KEYS[2]  shoal:{jobs:<kind>}:job:<job>, as in jobs_enqueue.lua
-- KEYS[3]  shoal:{jobs:<kind>}:serial:<tenant>:<serial>, as in jobs_lease.lua; KEYS[2] again for none
-- ARGV[1]  group    ARGV[2]  consumer    ARGV[3]  entry    ARGV[4]  epoch of the lease    ARGV[5]  lease in ms
--
-- Returns 1, or 0 when the lease is lost: the work must stop.

local fields = redis.call('HMGET', KEYS[2], 'epoch', 'state')
if fields[1] ~= ARGV[4] or fields[2] ~= 'leased' then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
if KEYS[3] ~= KEYS[2] then redis.call('PEXPIRE', KEYS[3], ARGV[5]) end
return 1
