"""The steps that change what the catalog knows of stored tails: one script each.

KEYS of each: ids by last use, ids by their end, the sum of bytes, places in the prefix index by id. ARGV of
each begins with the start of all keys of stored tails. What an entry says may be junk: sizes that are no
number count nothing.
"""

from __future__ import annotations

from typing import Final

_PRELUDE = """
local USED, EXPIRY, SUM, PLACES = unpack(KEYS, 1, 4)
local start = ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function number(text)
  return text and #text <= 15 and string.match(text, '^%d+$') and tonumber(text) or 0
end

local function sum()
  return number(redis.call('GET', SUM))
end

local function count(bytes)
  redis.call('SET', SUM, string.format('%.0f', math.max(0, sum() + bytes)))
end

local function drop(id)
  local key = start .. ':' .. id
  local found = redis.pcall('HMGET', key, 'fingerprint', 'namespace', 'bytes')
  local place = redis.call('HGET', PLACES, id)
  if not found.err and found[1] and found[2] then
    if place then redis.pcall('ZREM', start .. '-prefixes:' .. found[1] .. ':' .. found[2], place) end
    count(0 - number(found[3]))
  end
  local listed = redis.call('ZREM', USED, id) + redis.call('ZREM', EXPIRY, id)
  redis.call('HDEL', PLACES, id)
  return math.min(1, listed + redis.call('DEL', key))
end

local function is_read(id)
  local readers = start .. '-readers:' .. id
  redis.call('ZREMRANGEBYSCORE', readers, '-inf', now)
  return redis.call('ZCARD', readers) > 0
end

local function is_over(id)
  local ends = redis.call('ZSCORE', EXPIRY, id)
  return not ends or tonumber(ends) <= now
end
"""

# KEYS go on: the prefix index of its model and namespace, and that one's longest. ARGV: id, member, its full
# blocks, bytes, seconds to live, the budget, then the entry's fields and values. Lists a tail, then drops
# what was not used for longest until the budget is kept. Answers the bytes of all, and the ids dropped.
PUBLISH: Final = (
    _PRELUDE
    + """
local INDEX, LONGEST = KEYS[5], KEYS[6]
local id, member, blocks, bytes, ttl, budget = unpack(ARGV, 2, 7)
drop(id)
local longest = tonumber(redis.call('GET', LONGEST) or redis.call('EXISTS', INDEX) == 0 and -1)
redis.call('HSET', start .. ':' .. id, unpack(ARGV, 8))
redis.call('ZADD', USED, now, id)
redis.call('ZADD', EXPIRY, now + ttl, id)
redis.call('HSET', PLACES, id, member)
if longest and longest < tonumber(blocks) then redis.call('SET', LONGEST, blocks) end
redis.call('ZADD', INDEX, 0, member)
count(tonumber(bytes))
local dropped, rank = {}, 0
while sum() > tonumber(budget) do
  local oldest = redis.call('ZRANGE', USED, rank, rank)[1]
  if not oldest then break end
  if oldest == id or is_read(oldest) then
    rank = rank + 1
  else
    drop(oldest)
    dropped[#dropped + 1] = oldest
  end
end
return {sum(), dropped}
"""
)

# ARGV: id. Answers 1, or 0 where it is not listed (any more).
TOUCH: Final = (
    _PRELUDE
    + """
if is_over(ARGV[2]) then return 0 end
redis.call('ZADD', USED, 'XX', now, ARGV[2])
return 1
"""
)

# ARGV: id, the reader, seconds that its mark lasts. Answers 1, or 0 where it is not listed (any more).
READ: Final = (
    _PRELUDE
    + """
if is_over(ARGV[2]) then return 0 end
local readers = start .. '-readers:' .. ARGV[2]
redis.call('ZADD', readers, now + ARGV[4], ARGV[3])
redis.call('EXPIRE', readers, math.ceil(ARGV[4]))
redis.call('ZADD', USED, 'XX', now, ARGV[2])
return 1
"""
)

# ARGV: id, why. Drops a tail: of "ended" where its time is over, of "unused" where nobody reads it, of "gone"
# always. Answers 1, or 0 where it stays or was not there.
DROP: Final = (
    _PRELUDE
    + """
local id, why = ARGV[2], ARGV[3]
if why == 'ended' and not is_over(id) or why ~= 'gone' and is_read(id) then return 0 end
return drop(id)
"""
)

# ARGV: the sum as it was read or '', the right one. Sets it unless somebody changed it meanwhile.
CORRECT: Final = (
    _PRELUDE
    + """
if (redis.call('GET', SUM) or '') == ARGV[2] then redis.call('SET', SUM, ARGV[3]) end
"""
)
