"""How long an artifact is kept: a pin, or a time to live. A small file beside the blob says so.

The file is the truth, as the blob is for what it holds: a Redis that is lost loses no pin and forgets no end.
The catalog repeats it, so that ended artifacts are found without reading files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.blobs import BlobStore, store_errors
from xkv_artifacts.errors import ArtifactNotFound, InvalidLimits

if TYPE_CHECKING:
    from typing_extensions import Self

FOLDER: Final = "retention"
SUFFIX: Final = ".json"
LONGEST_TTL_S: Final = 100 * 365 * 86_400.0
_MOST_BYTES = 4096
_log = logging.getLogger(__name__)

Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class Retention(BaseModel):
    """What was promised of one artifact.

    Args:
        pinned: no collector deletes it, whatever its time and however full the store is.
        expires: seconds since the epoch, by the clock of the catalog's Redis, from which on it is gone. What
            is pinned does not end while it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["xkv-retention"] = "xkv-retention"
    version: Literal[1] = 1
    pinned: bool = False
    expires: Seconds | None = None

    def over(self, now: float) -> bool:
        """Whether its time is over."""
        return not self.pinned and self.expires is not None and self.expires <= now

    def with_ttl(self, ttl_s: float | None, now: float) -> Self:
        """The same with another time to live, counted from `now`; None: none.

        Raises:
            InvalidLimits: not a number of seconds above 0 and up to 100 years.
        """
        if ttl_s is not None and not (math.isfinite(ttl_s) and 0 < ttl_s <= LONGEST_TTL_S):
            raise InvalidLimits(
                f"a time to live of {ttl_s:g} s is not allowed", hint="give more than 0 s, at most 100 years"
            )
        return self.model_copy(update={"expires": None if ttl_s is None else now + ttl_s})


NO_PROMISE: Final = Retention()


class RetentionShelf:
    """The retention files of a store. An artifact without one has neither pin nor end.

    Every method raises StoreError where the store cannot be read or written.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._files = blobs.of(FOLDER, SUFFIX)

    def get(self, artifact_id: str) -> Retention:
        """What holds for an artifact. A file that cannot be understood counts as a pin: whoever wrote it
        wanted the artifact kept somehow, and `put` mends it.
        """
        try:
            with self._files.open(artifact_id) as file, store_errors("read", self._files.url):
                content = file.read(_MOST_BYTES)
        except (ArtifactNotFound, FileNotFoundError):
            return NO_PROMISE
        try:
            return Retention.model_validate_json(content)
        except ValidationError:
            _log.warning("the retention file of artifact %s is damaged: it counts as pinned", artifact_id)
            return Retention(pinned=True)

    def put(self, artifact_id: str, retention: Retention) -> None:
        """Write an artifact's file, in one step; where nothing is promised there is none."""
        if retention == NO_PROMISE:
            self.remove(artifact_id)
            return
        content = json.dumps(retention.model_dump(), allow_nan=False).encode("ascii") + b"\n"
        self._files.put(artifact_id, lambda file: file.write(content))

    def remove(self, artifact_id: str, *, durably: bool = True) -> bool:
        """Delete an artifact's file; False when there was none. `durably`: see `BlobStore.remove`."""
        return self._files.remove(artifact_id, durably=durably)

    def ids(self) -> Iterator[str]:
        """Artifacts that have a file, in order."""
        return self._files.ids()
