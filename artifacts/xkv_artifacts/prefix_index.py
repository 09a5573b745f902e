"""Longest stored prefix of a prompt, in one round trip, or two where a long prompt leaves it early, and one
more where artifacts have become longer since the last time.

One sorted set per model and namespace; all scores are 0, so Redis orders members by their bytes. A member is

    8-byte digest at the end of each full block | 0xFF | tokens of the last, partial block | 0xFFFFFFFF | id

(4 bytes a token, most significant first). The more bytes two such strings share, the longer the prefix that
their tokens share, and the member that shares most with a query stands right before or right after it.
Digests start with a 0 bit and tokens are below 2^31, so neither can be taken for the marks. Inside a block
digests tell nothing, so a second query asks, where the deepest common block ends, for the artifacts that end
in the next one. Only the tokens of a prompt's last SENT_BLOCKS blocks are sent for it (all of a long prompt
would cost more than the search); where the common blocks end before those, the caller sends that block's.

A prompt beyond the longest artifact is neither hashed nor sent: a number beside the sorted set says how many
blocks that one has, or more. Where it is missing or no number, nothing is known, and the whole prompt counts.

Artifacts of the same tokens, compressed differently, stand side by side: up to MOST_SPECS of them come back.
What comes back are candidates: the blob's own tokens decide.

Digests are made with the model's fingerprint, so what other models have of a prompt stands in their indexes
under other digests. A prompt that shares no block is told which models those are, the ones of most artifacts.
"""

from __future__ import annotations

from array import array

from xkv_artifacts.keys import BLOCK_TOKENS, DIGEST_BYTES, joined_block_hashes

_TAIL = b"\xff"
_END = b"\xff\xff\xff\xff"
ID_BYTES = 32
SENT_BLOCKS = 128
"""Blocks at a prompt's end whose tokens are sent along with its digests: 32 kB."""
FIRST_BLOCKS = 128
"""Blocks of a prompt that are hashed before the first answer has said how long artifacts are."""
MOST_SPECS = 8
"""Artifacts of the same tokens that one lookup tells apart."""
MOST_MODELS = 8
"""Other models of one namespace in whose indexes a prompt is looked for (a guess: revisions, data types)."""
MODEL_BLOCKS = 32
"""Blocks of a prompt that are hashed for each of them: 2,048 tokens."""

_FUNCTIONS = f"""
local function id_of(member)
  return (string.gsub(string.sub(member, -{ID_BYTES}), '.', function(c)
    return string.format('%02x', string.byte(c))
  end))
end

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function is_there(id)
  local ends = redis.call('ZSCORE', KEYS[3], id)
  return redis.call('EXISTS', entry .. id) == 1 and not (ends and tonumber(ends) <= now)
end

local function digest(text, block)
  return string.sub(text, (block - 1) * {DIGEST_BYTES} + 1, block * {DIGEST_BYTES})
end

local function common_blocks(member)
  local low, high = 0, #digests / {DIGEST_BYTES}
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if digest(member, middle) == digest(digests, middle) then low = middle else high = middle - 1 end
  end
  return low
end
"""

# KEYS: the sorted set, the most blocks of any artifact, when artifacts end, and the namespace's models where
# they are asked for. ARGV: digests, tokens (4 bytes each, most significant first), the block that the tokens
# begin at, prefix of entry keys, how many artifacts of the same tokens. Answers how many blocks the nearest
# artifact shares, the most blocks that any has (nothing, where that is unknown), ids, and, where no block is
# shared, the models of most artifacts. Members whose artifact has no entry any more, or whose time is over,
# are removed on the way, so they never hide another.
LOOKUP = f"""
local key, digests, tokens, sent, entry = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local specs = tonumber(ARGV[5])
local longest = redis.call('GET', KEYS[2]) or redis.call('EXISTS', key) == 0 and '0'
local found, seen = {{}}, {{}}

local function place(member)
  return string.sub(member, 1, -{ID_BYTES + 1})
end
{_FUNCTIONS}
local function live(command, from, to)
  local nearest, count = nil, 0
  while count < specs do
    local member = redis.call(command, key, from, to, 'LIMIT', count, 1)[1]
    if not member or (nearest and place(member) ~= place(nearest)) then break end
    local id = id_of(member)
    if is_there(id) then
      if not seen[id] then
        seen[id] = true
        found[#found + 1] = id
      end
      nearest = nearest or member
      count = count + 1
    else
      redis.call('ZREM', key, member)
    end
  end
  return nearest
end

local function ask(blocks)
  local first = (blocks - sent) * {4 * BLOCK_TOKENS} + 1
  local tail = string.sub(tokens, first, first + {4 * (BLOCK_TOKENS - 1)} - 1)
  local query = string.sub(digests, 1, blocks * {DIGEST_BYTES}) .. '\\255' .. tail
  local after = live('ZRANGEBYLEX', '[' .. query, '+')
  local before = live('ZREVRANGEBYLEX', '(' .. query, '-')
  return math.max(after and common_blocks(after) or 0, before and common_blocks(before) or 0)
end

local all = #digests / {DIGEST_BYTES}
local deepest = ask(all)
if sent <= deepest and deepest < all then ask(deepest) end
local models = deepest == 0 and KEYS[4] and redis.pcall('ZREVRANGE', KEYS[4], 0, {MOST_MODELS}) or {{}}
return {{deepest, longest, found, models.err and {{}} or models}}
"""

# KEYS as above. ARGV: digests, all tokens, prefix of entry keys. Answers the ids of the longest artifacts
# that these tokens begin with, whole. Those that end inside a block stand right behind all that go on beyond
# it, so the member behind those that were looked through says which block can be next.
LOOKUP_WHOLE = f"""
local key, digests, tokens, entry = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
{_FUNCTIONS}
local last = string.rep('\\255', {ID_BYTES + 1})

local function ending_in(block)
  local first = block * {4 * BLOCK_TOKENS} + 1
  local tail = string.sub(tokens, first, first + {4 * (BLOCK_TOKENS - 1)} - 1)
  for length = #tail, 0, -4 do
    local place = string.sub(digests, 1, block * {DIGEST_BYTES}) .. '\\255' .. string.sub(tail, 1, length)
    place = place .. '\\255\\255\\255\\255'
    local found = {{}}
    for _, member in ipairs(redis.call('ZRANGEBYLEX', key, '[' .. place, '(' .. place .. last)) do
      local id = id_of(member)
      if is_there(id) and #found < {MOST_SPECS} then found[#found + 1] = id end
    end
    if #found > 0 then return found end
  end
end

local block = #digests / {DIGEST_BYTES}
while block >= 0 do
  local found = ending_in(block)
  if found then return found end
  local beyond = string.sub(digests, 1, block * {DIGEST_BYTES}) .. '\\255\\255\\255\\255\\255' .. last
  local behind = redis.call('ZRANGEBYLEX', key, '(' .. beyond, '+', 'LIMIT', 0, 1)[1]
  if not behind then break end
  block = math.min(common_blocks(behind), block - 1)
end
return {{}}
"""


def member(fingerprint: str, namespace: str, tokens: bytes, artifact_id: str) -> bytes:
    """The sorted set's member for an artifact.

    Args:
        tokens: token ids as little-endian int32 bytes.
    """
    digests = joined_block_hashes(fingerprint, namespace, tokens)
    tail = big_endian(tokens[4 * BLOCK_TOKENS * (len(digests) // DIGEST_BYTES) :])
    return digests + _TAIL + tail + _END + bytes.fromhex(artifact_id)


def shared_tokens(place: bytes, digests: bytes, tokens: bytes) -> int:
    """How many leading tokens a member's artifact and a prompt share, as far as the member tells: where they
    part inside a full block, up to 63 more.

    Args:
        place: a member of the sorted set, not trusted.
        digests: of the prompt's full blocks. tokens: its ids as little-endian int32 bytes.
    """
    body = place[: -ID_BYTES - len(_END)]
    blocks = body[::DIGEST_BYTES].find(_TAIL)
    if blocks < 0:
        return 0
    shared = common_tokens(body[: DIGEST_BYTES * blocks], digests) * 4 // DIGEST_BYTES
    if shared < blocks:
        return BLOCK_TOKENS * shared
    tail = body[DIGEST_BYTES * blocks + 1 :]
    rest = big_endian(tokens[4 * BLOCK_TOKENS * blocks :][: len(tail) // 4 * 4])
    return BLOCK_TOKENS * blocks + common_tokens(tail, rest)


def big_endian(tokens: bytes) -> bytes:
    """Little-endian int32 bytes with each token's bytes the other way round: ordered as the tokens are."""
    swapped = array("i", tokens)
    swapped.byteswap()
    return swapped.tobytes()


def common_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two little-endian int32 strings share."""
    low, high = 0, min(len(left), len(right)) // 4
    if left[: 4 * high] == right[: 4 * high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[4 * low : 4 * middle] == right[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
