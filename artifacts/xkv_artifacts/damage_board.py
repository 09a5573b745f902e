"""Prefixes that were found damaged, for whoever can make them again.

Who finds the damage may not have what that takes: the prefix's tokens. When a catalog is made again there is
no prompt at all. So it is noted here, with the manifest where the blob's header was whole, and whoever meets
a prompt that holds the prefix takes the note. Notes are advice: an artifact's id says what it is made from.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, Final

from pydantic import ValidationError

from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.redis_link import RedisLink

DAMAGED_KEY: Final = STORE_KEYS + "damaged"  # hash: artifact id -> its manifest as JSON, or nothing
KEEP_S: Final = 7 * 86_400
"""Seconds after the last damage: what nobody asked for in a week is not made again."""
MOST_NOTES: Final = 256
"""More damage is not noted: a lookup may compare its prompt with all of them."""
_log = logging.getLogger(__name__)

# KEYS: damaged. ARGV: id, manifest, seconds to keep, most notes. What was known stays.
_NOTE = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return 0 end
if not known or ARGV[2] ~= '' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class DamageBoard:
    """The notes of one store; damaged ones count as none. Every method raises CatalogUnavailable."""

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self._link = link
        self._key = DAMAGED_KEY.format(store=store_id)

    def note(self, artifact_id: str, manifest: PrefixManifest | None) -> bool:
        """Note that an artifact was damaged and is in quarantine; False where there are too many notes. Tried
        once: somebody waits for what was to be read.

        Args:
            manifest: None where it could not be read.
        """
        text = "" if manifest is None else manifest.model_copy(update={"tensors": {}}).model_dump_json()
        bounds = [str(KEEP_S), str(MOST_NOTES)]
        with suppress(CatalogError):
            return bool(self._link.script(_NOTE, [self._key], [artifact_id, text, *bounds], patience_s=0))
        return False

    def all(self) -> dict[str, PrefixManifest | None]:
        """The artifacts that are noted, each with its manifest where that is known."""
        raw: Any = {}
        with suppress(CatalogError):
            raw = self._link.call(lambda client: client.hgetall(self._key))
        found = {field.decode("utf-8", "replace"): text for field, text in raw.items()}
        return {name: _manifest(name, text) for name, text in found.items() if is_artifact_id(name)}

    def get(self, artifact_id: str) -> PrefixManifest | None:
        """The manifest that is noted, or None."""
        text: Any = None
        with suppress(CatalogError):
            text = self._link.call(lambda client: client.hget(self._key, artifact_id))
        return None if text is None else _manifest(artifact_id, text)

    def take(self, artifact_id: str) -> bool:
        """Forget a note, since it is being made again, stored or deleted; False where there was none."""
        with suppress(CatalogError):
            return bool(self._link.call(lambda client: client.hdel(self._key, artifact_id)))
        return False


def _manifest(artifact_id: str, text: bytes) -> PrefixManifest | None:
    if not text:
        return None
    try:
        manifest = PrefixManifest.model_validate_json(text)
    except ValidationError:
        manifest = None
    if manifest is None or manifest.id != artifact_id:
        _log.warning("what is noted of the damaged artifact %s cannot be read", artifact_id)
        return None
    return manifest
