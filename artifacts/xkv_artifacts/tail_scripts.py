"""The steps that change what the catalog knows of stored tails: one script each.

KEYS of each: ids by last use, ids by their end, the sum of bytes, places in the prefix index by id,
namespaces by the bytes they hold. ARGV of each begins with the start of all keys of stored tails. What an
entry says may be junk: sizes that are no number count nothing.
"""

from __future__ import annotations

from typing import Final

_PRELUDE = """
local USED, EXPIRY, SUM, PLACES, SHARES = unpack(KEYS, 1, 5)
local start = ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function number(text)
  return text and #text <= 15 and string.match(text, '^%d+$') and tonumber(text) or 0
end

local function sum()
  return number(redis.call('GET', SUM))
end

local function of(namespace)
  return start .. '-namespace:' .. namespace
end

local function fields(id)
  local found = redis.pcall('HMGET', start .. ':' .. id, 'fingerprint', 'namespace', 'bytes')
  if found.err then return {} end
  return found
end

local function count(namespace, bytes)
  redis.call('SET', SUM, string.format('%.0f', math.max(0, sum() + bytes)))
  redis.call('ZINCRBY', SHARES, bytes, namespace)
end

local function leave(namespace, id)
  redis.call('ZREM', of(namespace), id)
  if redis.call('ZCARD', of(namespace)) == 0 then redis.call('ZREM', SHARES, namespace) end
end

local function use(id)
  redis.call('ZADD', USED, 'XX', now, id)
  local namespace = fields(id)[2]
  if namespace then redis.call('ZADD', of(namespace), 'XX', now, id) end
end

local function drop(id)
  local fingerprint, namespace, bytes = unpack(fields(id), 1, 3)
  local place = redis.call('HGET', PLACES, id)
  if fingerprint and namespace then
    if place then redis.pcall('ZREM', start .. '-prefixes:' .. fingerprint .. ':' .. namespace, place) end
    count(namespace, 0 - number(bytes))
    leave(namespace, id)
  end
  local listed = redis.call('ZREM', USED, id) + redis.call('ZREM', EXPIRY, id)
  redis.call('HDEL', PLACES, id)
  return math.min(1, listed + redis.call('DEL', start .. ':' .. id))
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
# blocks, bytes, seconds to live, the budget, its namespace, then the entry's fields and values. Lists a tail.
# While the budget is exceeded, the namespace that holds most loses what it has not used for longest. Where
# that comes to the new tail itself, it alone is dropped; but where older ones of its namespace stay because
# they are read, the budget is exceeded until they can go. Answers the bytes of all, and the ids dropped.
PUBLISH: Final = (
    _PRELUDE
    + """
local INDEX, LONGEST = KEYS[6], KEYS[7]
local id, member, blocks, bytes, ttl, budget, namespace = unpack(ARGV, 2, 8)
drop(id)
local longest = tonumber(redis.call('GET', LONGEST) or redis.call('EXISTS', INDEX) == 0 and -1)
redis.call('HSET', start .. ':' .. id, unpack(ARGV, 9))
redis.call('ZADD', USED, now, id)
redis.call('ZADD', of(namespace), now, id)
redis.call('ZADD', EXPIRY, now + ttl, id)
redis.call('HSET', PLACES, id, member)
if longest and longest < tonumber(blocks) then redis.call('SET', LONGEST, blocks) end
redis.call('ZADD', INDEX, 0, member)
count(namespace, tonumber(bytes))

local over, shares, ranks, leaving, waits = sum() - tonumber(budget), {}, {}, {}, false
if over > 0 then
  local listed = redis.call('ZRANGE', SHARES, 0, -1, 'WITHSCORES')
  for place = 1, #listed, 2 do shares[listed[place]] = tonumber(listed[place + 1]) end
end
while over > 0 do
  local most
  for owner, held in pairs(shares) do
    if not most or held > shares[most] then most = owner end
  end
  if not most then break end
  local rank = ranks[most] or 0
  local oldest = redis.call('ZRANGE', of(most), rank, rank)[1]
  ranks[most] = rank + 1
  if oldest == id then
    if not waits then leaving = {{namespace, id}} end
    break
  elseif not oldest then
    shares[most] = nil
  elseif is_read(oldest) then
    waits = waits or most == namespace
  else
    local held = number(fields(oldest)[3])
    shares[most], over = shares[most] - held, over - held
    leaving[#leaving + 1] = {most, oldest}
  end
end
local dropped = {}
for _, gone in ipairs(leaving) do
  drop(gone[2])
  leave(gone[1], gone[2])
  dropped[#dropped + 1] = gone[2]
end
return {sum(), dropped}
"""
)

# ARGV: id. Answers 1, or 0 where it is not listed (any more).
TOUCH: Final = (
    _PRELUDE
    + """
if is_over(ARGV[2]) then return 0 end
use(ARGV[2])
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
use(ARGV[2])
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

# ARGV: a namespace, ids. Keeps those that are listed in the namespace's set, and no other of them.
PLACE: Final = (
    _PRELUDE
    + """
for place = 3, #ARGV do
  local used = redis.call('ZSCORE', USED, ARGV[place])
  if used then redis.call('ZADD', of(ARGV[2]), used, ARGV[place]) else leave(ARGV[2], ARGV[place]) end
end
"""
)

# ARGV: the sum as it was read or '', the right one, then namespaces, each followed by the bytes it holds.
# Sets them unless somebody changed the sum meanwhile.
CORRECT: Final = (
    _PRELUDE
    + """
if (redis.call('GET', SUM) or '') ~= ARGV[2] then return end
local before = redis.call('ZRANGE', SHARES, 0, -1)
redis.call('SET', SUM, ARGV[3])
redis.call('DEL', SHARES)
for place = 4, #ARGV, 2 do redis.call('ZADD', SHARES, ARGV[place + 1], ARGV[place]) end
for _, namespace in ipairs(before) do
  if not redis.call('ZSCORE', SHARES, namespace) then redis.call('DEL', of(namespace)) end
end
"""
)
