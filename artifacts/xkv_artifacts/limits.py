"""What a store and its namespaces may hold. The store's own file says it, to all who open the store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.errors import InvalidLimits
from xkv_artifacts.manifest import Namespace

LIMITS_FILE: Final = "limits.json"
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([kKMGTP]?)(i?)B?", re.ASCII)
_MOST_BYTES = 1 << 20


def parse_size(text: str) -> int:
    """Bytes: "100GB" is 100 * 1000^3, "100GiB" is 100 * 1024^3; kB to PB, or a bare number.

    Raises:
        InvalidLimits
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InvalidLimits(f"{text[:40]!r} is not a size", hint="write it as 100GB, 1.5TiB or bytes")
    power = " kMGTP".index(match[2].replace("K", "k") or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power) if power else int(float(match[1]))


def _size(value: Any) -> Any:
    try:
        return parse_size(value) if isinstance(value, str) else value
    except InvalidLimits as error:
        raise ValueError(error.message) from None


Size = Annotated[int, BeforeValidator(_size), Field(ge=0, lt=2**62, strict=True)]


class Quota(BaseModel):
    """What one namespace may hold. None: as much as there is.

    Args:
        bytes: of its blobs. artifacts: their number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Size | None = None
    artifacts: int | None = Field(default=None, ge=0, lt=2**62, strict=True)

    @property
    def unlimited(self) -> bool:
        """Whether nothing is limited."""
        return self.bytes is None and self.artifacts is None


UNLIMITED: Final = Quota()


class Limits(BaseModel):
    """What a store may hold.

    Args:
        budget: bytes of all prefix artifacts and calibrations together.
        each: the quota of every namespace that has none of its own.
        namespaces: quotas by namespace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Size | None = None
    each: Quota = UNLIMITED
    namespaces: dict[Namespace, Quota] = {}

    def quota(self, namespace: str) -> Quota:
        """What a namespace may hold."""
        return self.namespaces.get(namespace, self.each)


def parse_limits(content: bytes, where: str) -> Limits:
    """Limits as the file holds them (docs/retention.md).

    Raises:
        InvalidLimits: names the field.
    """
    if len(content) > _MOST_BYTES:
        raise InvalidLimits(f"{where} is larger than 1 MiB", hint="it is no file of limits")
    try:
        return Limits.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidLimits(
            f"{where}: {place[:100]}: {first['msg'][:200]}", hint="docs/retention.md shows how it looks"
        ) from None


def limits_of_file(path: Path) -> Limits:
    """The limits in a file.

    Raises:
        InvalidLimits: no such file, or its content is none.
    """
    try:
        return parse_limits(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidLimits(f"cannot read {path}: {error.strerror}", hint="give a file of limits") from None


def limits_of_store(blobs: BlobStore) -> Limits:
    """The limits in the store's own file; without one nothing is limited.

    Raises:
        InvalidLimits, StoreError
    """
    content = blobs.root_file(LIMITS_FILE)
    return Limits() if content is None else parse_limits(content, f"{blobs.url}/{LIMITS_FILE}")
