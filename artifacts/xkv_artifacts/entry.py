"""A catalog entry: what Redis says about an artifact. Good for listing and finding, never for correctness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.manifest import Name, PrefixManifest, Sha256
from xkv_artifacts.retention import NO_PROMISE, Retention, Seconds

if TYPE_CHECKING:
    from typing_extensions import Self

RedisHash = Mapping[bytes, bytes]
REBUILD_HINT = "xkv index rebuild"


class HashEntry(BaseModel):
    """What Redis keeps as a hash under its id, and its id in a sorted set by the field that `score` names."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    score: ClassVar[str]

    id: Sha256

    def to_hash(self) -> dict[str, str]:
        """The fields as the Redis hash holds them; what is None has none."""
        fields = self.model_dump(exclude={"id", self.score}, exclude_none=True)
        return {
            name: repr(value) if isinstance(value, float) else str(value) for name, value in fields.items()
        }

    @classmethod
    def from_hash(cls, artifact_id: str, fields: RedisHash, score: float) -> Self:
        """Parse what Redis answered.

        Raises:
            CatalogError: it is not a catalog entry.
        """
        try:
            texts = {name.decode("utf-8"): value.decode("utf-8") for name, value in fields.items()}
            return cls.model_validate({**texts, "id": artifact_id, cls.score: score})
        except UnicodeDecodeError:
            reason = "not text"
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise bad_entry(artifact_id, reason)


class Entry(HashEntry):
    """One artifact in the catalog.

    Args:
        blob: the blob's name in the store, for people; readers derive it from the id.
        bytes, bytes_full: size of the blob and of the exact cache.
        tokens: length of the prefix.
        model: the model's name. fingerprint: its fingerprint.
        document, document_sha256: where the prefix came from and its content's hash.
        fidelity: top-1 agreement with the exact cache, 0 to 1.
        kl: divergence from it (nats); None in entries of before. kl_limit: as the manifest has it.
        calibration: id of the one that the artifact was made with, None without.
        spec: digest of how it was compressed; see `Catalog.keep_spec`. None in entries of before.
        ratio: bytes_full / bytes.
        created, last_used: seconds since the epoch.
        pinned, expires: as the artifact's retention file says; see `retention`.
    """

    score: ClassVar[str] = "last_used"

    state: Literal["ready"] = "ready"
    blob: Name
    bytes: int = Field(ge=1)
    bytes_full: int = Field(ge=1)
    tokens: int = Field(ge=1)
    model: Name
    fingerprint: Sha256
    namespace: Name
    document: Name
    document_sha256: Sha256
    fidelity: float = Field(ge=0, le=1)
    kl: float | None = Field(default=None, ge=0)
    kl_limit: float | None = Field(default=None, ge=0)
    calibration: Sha256 | None = None
    spec: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")
    ratio: float = Field(ge=0)
    created: float
    last_used: float
    pinned: bool = False
    expires: Seconds | None = None

    @classmethod
    def of_manifest(
        cls, manifest: PrefixManifest, *, size: int, last_used: float, retention: Retention = NO_PROMISE
    ) -> Entry:
        """The entry of a blob of `size` bytes."""
        return cls(
            id=manifest.id,
            blob=blob_name(manifest.id),
            bytes=size,
            bytes_full=manifest.bytes_full,
            tokens=manifest.tokens,
            model=manifest.model.name,
            fingerprint=manifest.model.fingerprint,
            namespace=manifest.namespace,
            document=manifest.document.uri,
            document_sha256=manifest.document.sha256,
            fidelity=manifest.fidelity.top1_agreement,
            kl=manifest.fidelity.kl,
            kl_limit=manifest.fidelity.kl_limit,
            calibration=_calibration(manifest.spec),
            spec=spec_digest(manifest.spec),
            ratio=manifest.bytes_full / size,
            created=manifest.created.timestamp(),
            last_used=last_used,
            pinned=retention.pinned,
            expires=retention.expires,
        )


def _calibration(spec: Mapping[str, Any]) -> str | None:
    """A blob's spec may say anything."""
    found = spec.get("calibration")
    return found if isinstance(found, str) and is_artifact_id(found) else None


def spec_text(spec: Mapping[str, Any]) -> str:
    """A compression spec as the catalog keeps it."""
    return json.dumps(spec, separators=(",", ":"))


def spec_digest(spec: Mapping[str, Any]) -> str:
    """Its name there: 16 hex digits."""
    return hashlib.sha256(spec_text(spec).encode()).hexdigest()[:16]


def bad_entry(artifact_id: str, reason: str) -> CatalogError:
    """The error for an entry that is not one, whatever its name holds."""
    return CatalogError(f"catalog entry {artifact_id[:80]!r} is damaged: {reason[:200]}", hint=REBUILD_HINT)
