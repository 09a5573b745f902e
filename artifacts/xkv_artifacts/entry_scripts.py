"""The steps that change an entry together with all that is counted and ordered beside it: one script each.

An artifact stands in its namespace's sorted set exactly while its bytes are in that namespace's sum and in
the sum of all, and it is counted for its model there, so each script that adds or takes away keeps them
right, and doing it twice changes nothing. Of a catalog that did not count models, some are unknown.

KEYS of each: the entry's hash, recency, expiry, sums, the lease on the id, readers of the id, that it was
deleted.
ARGV of each begins: id, the start of namespaces' sorted sets. What an entry says of itself may be junk:
sizes of more than 15 digits, or that are no number, count nothing.
"""

from __future__ import annotations

from typing import Final

from xkv_artifacts.damage_board import NOTE

_PRELUDE = """
local ENTRY, RECENCY, EXPIRY, SUMS, LEASE, READERS, DELETED = unpack(KEYS, 1, 7)
local id, namespaces = ARGV[1], ARGV[2]

local function seconds()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end

local function number(text)
  return text and #text <= 15 and string.match(text, '^%d+$') and tonumber(text) or 0
end

local function entry(...)
  local found = redis.pcall('HMGET', ENTRY, ...)
  return found.err and {} or found
end

local function count(namespace, bytes, fingerprint, artifacts)
  redis.call('HINCRBY', SUMS, namespace, bytes)
  redis.call('HINCRBY', SUMS, '*', bytes)
  local models = namespaces .. namespace .. ':models'
  if fingerprint then redis.pcall('ZINCRBY', models, artifacts, fingerprint) end
  redis.pcall('ZREMRANGEBYSCORE', models, '-inf', 0)
end

local function leave()
  local old = entry('namespace', 'bytes', 'fingerprint')
  if old[1] and redis.call('ZREM', namespaces .. old[1], id) == 1 then
    count(old[1], 0 - number(old[2]), old[3], -1)
  end
end

local function expire(ends, pinned)
  if ends == '' or pinned == 'True' then
    redis.call('ZREM', EXPIRY, id)
  else
    redis.call('ZADD', EXPIRY, ends, id)
  end
end

local function drop()
  leave()
  redis.call('ZREM', RECENCY, id)
  redis.call('ZREM', EXPIRY, id)
  return redis.call('DEL', ENTRY)
end

local function touch(now)
  redis.call('ZADD', RECENCY, 'XX', now, id)
  local namespace = entry('namespace')[1]
  if namespace then redis.call('ZADD', namespaces .. namespace, 'XX', now, id) end
end
"""

# KEYS go on: prefixes, longest, indexed. ARGV: member, its full blocks, last used, namespace, fingerprint,
# bytes, expires or '', pinned, the quota's bytes and artifacts or '', then the entry's fields and values.
# Answers 1, or 0 where the quota does not allow it. Where an index is there and `longest` is not, nobody
# knows it, and it stays missing.
PUBLISH: Final = (
    _PRELUDE
    + """
local PREFIXES, LONGEST, INDEXED = unpack(KEYS, 8, 10)
local member, blocks, used, namespace, fingerprint, bytes, ends, pinned = unpack(ARGV, 3, 10)
local most_bytes, most = unpack(ARGV, 11, 12)
local own = namespaces .. namespace

if most_bytes ~= '' or most ~= '' then
  local there = redis.call('ZSCORE', own, id)
  local old = there and number(entry('bytes')[1]) or 0
  local sum = (tonumber(redis.call('HGET', SUMS, namespace) or '0') or 0) - old + tonumber(bytes)
  if most_bytes ~= '' and sum > tonumber(most_bytes) then return 0 end
  if most ~= '' and redis.call('ZCARD', own) + (there and 0 or 1) > tonumber(most) then return 0 end
end

if redis.call('EXISTS', RECENCY) == 0 then redis.call('SET', INDEXED, 1) end
local last = redis.call('ZSCORE', RECENCY, id)
local longest = tonumber(redis.call('GET', LONGEST) or redis.call('EXISTS', PREFIXES) == 0 and -1)
leave()
redis.call('DEL', ENTRY)
redis.call('HSET', ENTRY, unpack(ARGV, 13))
used = math.max(tonumber(used), tonumber(last or 0))
redis.call('ZADD', RECENCY, used, id)
redis.call('ZADD', own, used, id)
count(namespace, tonumber(bytes), fingerprint, 1)
expire(ends, pinned)
if longest and longest < tonumber(blocks) then redis.call('SET', LONGEST, blocks) end
redis.call('ZADD', PREFIXES, 0, member)
return 1
"""
)

# Answers 1, or 0 where there was no entry.
DROP: Final = _PRELUDE + "return drop()"

# Drops an entry, for its blob to be deleted, and keeps for a while that it was. ARGV: seconds to keep that.
# Answers as DROP.
DELETE: Final = (
    _PRELUDE
    + """
redis.call('SET', DELETED, 1, 'EX', ARGV[3])
return drop()
"""
)

# Drops an entry whose blob is gone. Notes it, and answers its pin and its end, where nobody deleted the
# artifact and its time is not over; else answers nothing. Whoever deletes drops the entry before the blob; so
# what is listed here was not deleted, unless somebody who had read the blob before listed it again: that it
# was deleted is kept. KEYS go on: damaged, specs. ARGV: the note where it is not known how it was compressed,
# seconds to keep it, most notes.
MISS: Final = (
    _PRELUDE
    + NOTE
    + """
local ends = redis.call('ZSCORE', EXPIRY, id)
local over = ends and tonumber(ends) <= seconds() or redis.call('EXISTS', DELETED) == 1
local promised, text = entry('pinned', 'expires'), ARGV[3]
local answer = {promised[1] or '', promised[2] or ''}
local names, said = {'namespace', 'tokens', 'document', 'document_sha256'}, {missing = true}
for place, value in ipairs(entry(unpack(names))) do said[names[place]] = value or '' end
said.spec = redis.pcall('HGET', KEYS[9], entry('spec')[1] or '')
if type(said.spec) == 'string' then text = cjson.encode(said) end
if drop() == 0 or over then return {} end
note(KEYS[8], id, text, ARGV[4], ARGV[5])
return answer
"""
)

# KEYS: specs. ARGV: digest, text, most specs.
KEEP_SPEC: Final = """
if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[3]) then redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) end
return 1
"""

TOUCH: Final = _PRELUDE + "touch(seconds())"

# ARGV: pinned, expires or ''. Answers 1, or 0 where there is no entry.
RETAIN: Final = (
    _PRELUDE
    + """
if redis.call('EXISTS', ENTRY) == 0 then return 0 end
redis.call('HSET', ENTRY, 'pinned', ARGV[3])
if ARGV[4] == '' then
  redis.call('HDEL', ENTRY, 'expires')
else
  redis.call('HSET', ENTRY, 'expires', ARGV[4])
end
expire(ARGV[4], ARGV[3])
return 1
"""
)

# ARGV: the reader, seconds that its mark lasts. Answers 1, or 0 where the artifact's time is over.
READ: Final = (
    _PRELUDE
    + """
local now = seconds()
local ends = redis.call('ZSCORE', EXPIRY, id)
if ends and tonumber(ends) <= now then return 0 end
redis.call('ZADD', READERS, now + ARGV[4], ARGV[3])
redis.call('EXPIRE', READERS, math.ceil(ARGV[4]))
touch(now)
return 1
"""
)

# ARGV: the start of readers' keys, seconds that marks last, then artifact ids and readers by turns.
RENEW_READS: Final = """
local time = redis.call('TIME')
for i = 3, #ARGV, 2 do
  redis.call('ZADD', ARGV[1] .. ARGV[i], time[1] + time[2] / 1000000 + ARGV[2], ARGV[i + 1])
  redis.call('EXPIRE', ARGV[1] .. ARGV[i], math.ceil(ARGV[2]))
end
"""

# Drops an entry, for its blob to be deleted, if the reason still holds; the lease on the id is taken with it,
# so that nobody writes the blob anew meanwhile. ARGV: reason, the collector, milliseconds of its lease, last
# use as seen, then of 'quota' the namespace, and the bytes and artifacts from which on it holds no more; of
# 'budget' the bytes; last the seconds to keep that it was deleted. Answers a word.
COLLECT: Final = (
    _PRELUDE
    + """
local reason, collector, lease_ms, seen, namespace, bytes, artifacts = unpack(ARGV, 3, 9)
local now = seconds()

local function above(name, limit)
  return limit ~= '' and (tonumber(redis.call('HGET', SUMS, name) or '0') or 0) > tonumber(limit)
end

local used = redis.call('ZSCORE', RECENCY, id)
if not used then return 'gone' end
if reason == 'expired' then
  local ends = redis.call('ZSCORE', EXPIRY, id)
  if not ends or tonumber(ends) > now then return 'kept' end
else
  if tonumber(used) ~= tonumber(seen) then return 'used' end
  if entry('pinned')[1] == 'True' then return 'pinned' end
end
if reason == 'quota' and not above(namespace, bytes)
  and not (artifacts ~= '' and redis.call('ZCARD', namespaces .. namespace) > tonumber(artifacts)) then
  return 'enough'
end
if reason == 'budget' and not above('*', bytes) then return 'enough' end
redis.call('ZREMRANGEBYSCORE', READERS, '-inf', now)
if redis.call('ZCARD', READERS) > 0 then return 'read' end
if redis.call('EXISTS', LEASE) == 1 then return 'leased' end
redis.call('SET', LEASE, collector, 'PX', lease_ms)
redis.call('SET', DELETED, 1, 'EX', ARGV[10])
drop()
return 'dropped'
"""
)

SET_BUILT = """
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
return 1
"""
"""Keys: of one listing, of a catalog that is built. Argument: the time. 0: the listing is not known."""
