"""Prefixes whose blobs were found damaged or missing, for whoever can make them again.

Who finds that may not have what it takes: the prefix's tokens. When a catalog is made again there is no
prompt at all. So it is noted here, with what it was made from where the blob's header or the catalog says so,
and whoever meets a prompt that holds the prefix takes the note. Notes are advice: an artifact's id says what
it is made from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, Json, ValidationError

from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.manifest import Count, Name, Sha256
from xkv_artifacts.origin import Origin
from xkv_artifacts.redis_link import RedisLink

DAMAGED_KEY: Final = STORE_KEYS + "damaged"  # hash: artifact id -> _Noted as JSON, MISSING, or nothing
KEEP_S: Final = 7 * 86_400
"""Seconds after the last note: what nobody asked for in a week is not made again."""
MOST_NOTES: Final = 256
"""More is not noted: a lookup may compare its prompt with all of them."""
MISSING: Final = "missing"
_log = logging.getLogger(__name__)

# What it was made from stays, where that was known.
NOTE: Final = """
local function note(board, id, text, keep_s, most)
  local known = redis.pcall('HGET', board, id)
  if type(known) == 'table' then return 0 end
  if not known and redis.call('HLEN', board) >= tonumber(most) then return 0 end
  if not known or string.sub(text, 1, 1) == '{' then redis.call('HSET', board, id, text) end
  redis.call('EXPIRE', board, keep_s)
  return 1
end
"""
# KEYS: damaged. ARGV: id, whether it is theirs whatever the note says ("1"), their namespaces.
_TAKE_OWN = """
local text = redis.call('HGET', KEYS[1], ARGV[1])
if not text then return 0 end
local theirs = ARGV[2] == '1'
local read, note = pcall(cjson.decode, text)
if read and type(note) == 'table' then
  for at = 3, #ARGV do theirs = theirs or note.namespace == ARGV[at] end
end
return theirs and redis.call('HDEL', KEYS[1], ARGV[1]) or 0
"""
# KEYS: damaged. ARGV: id, text, seconds to keep, most notes.
_NOTE = NOTE + "return note(KEYS[1], unpack(ARGV))"


@dataclass(frozen=True)
class Note:
    """What is known of an artifact that cannot be read: what it was made from, or None; whether its blob is
    missing or damaged.
    """

    origin: Origin | None = None
    missing: bool = False


class _Noted(BaseModel):
    """A note with an origin, as Redis keeps it; a script makes it of an entry's fields."""

    missing: bool
    namespace: Name
    spec: Json[dict[str, Any]]
    tokens: Count
    document: Name
    document_sha256: Sha256


class DamageBoard:
    """The notes of one store; damaged ones count as none. Every method raises CatalogUnavailable."""

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self._link = link
        self._key = DAMAGED_KEY.format(store=store_id)

    def note(self, artifact_id: str, note: Note) -> bool:
        """Note that an artifact's blob is in quarantine or missing; False where there are too many notes.
        Tried once: somebody waits for what was to be read.
        """
        text = _text(note)
        bounds = [str(KEEP_S), str(MOST_NOTES)]
        with suppress(CatalogError):
            return bool(self._link.script(_NOTE, [self._key], [artifact_id, text, *bounds], patience_s=0))
        return False

    def all(self) -> dict[str, Note]:
        """What is noted, by artifact."""
        raw: Any = {}
        with suppress(CatalogError):
            raw = self._link.call(lambda client: client.hgetall(self._key))
        found = {field.decode("utf-8", "replace"): text for field, text in raw.items()}
        return {name: _note(name, text) for name, text in found.items() if is_artifact_id(name)}

    def get(self, artifact_id: str) -> Note | None:
        """What is noted of an artifact, or None."""
        text: Any = None
        with suppress(CatalogError):
            text = self._link.call(lambda client: client.hget(self._key, artifact_id))
        return None if text is None else _note(artifact_id, text)

    def take(self, artifact_id: str) -> bool:
        """Forget a note, since it is being made again, stored or deleted; False where there was none."""
        with suppress(CatalogError):
            return bool(self._link.call(lambda client: client.hdel(self._key, artifact_id)))
        return False

    def take_own(self, artifact_id: str, namespaces: Sequence[str], *, held: bool) -> bool:
        """`take`, where what it was made from is of these namespaces, or `held`: the artifact is theirs.
        Redis is asked the same for any other.
        """
        asked = [artifact_id, "1" if held else "0", *namespaces]
        with suppress(CatalogError):
            return bool(self._link.script(_TAKE_OWN, [self._key], asked))
        return False


def _text(note: Note) -> str:
    made = note.origin
    if made is None:
        return MISSING if note.missing else ""
    spec = json.dumps(made.spec)
    fields = {"missing": note.missing, "namespace": made.namespace, "spec": spec, "tokens": made.tokens}
    return json.dumps({**fields, "document": made.name, "document_sha256": made.sha256})


def _note(artifact_id: str, text: bytes) -> Note:
    if not text or text == MISSING.encode():
        return Note(missing=bool(text))
    try:
        said = _Noted.model_validate_json(text)
    except ValidationError:
        _log.warning("what is noted of the damaged artifact %s cannot be read", artifact_id)
        return Note()
    origin = Origin(said.namespace, said.spec, said.tokens, said.document, said.document_sha256)
    return Note(origin, said.missing)
