"""A calibration in the catalog: what Redis says about it. Good for listing, never for correctness."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_artifacts.entry import HashEntry
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.manifest import Name, Sha256

CALIBRATION_KEY = STORE_KEYS + "calibration:{id}"  # hash: see CalibrationEntry
CALIBRATIONS_KEY = (
    STORE_KEYS + "calibrations"
)  # sorted set: every calibration's id, by the second it was made


class CalibrationEntry(HashEntry):
    """One calibration in the catalog.

    Args:
        bytes: size of the blob.
        model: the model's name. fingerprint: its fingerprint.
        documents, tokens: of the sample it was made from.
        groups: groups of layers that share bases.
        created: seconds since the epoch.
    """

    score: ClassVar[str] = "created"

    bytes: int = Field(ge=1)
    model: Name
    fingerprint: Sha256
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    groups: int = Field(ge=1)
    created: float

    @classmethod
    def of_manifest(cls, manifest: CalibrationManifest, *, size: int) -> CalibrationEntry:
        """The entry of a blob of `size` bytes."""
        return cls(
            id=manifest.id,
            bytes=size,
            model=manifest.model.name,
            fingerprint=manifest.model.fingerprint,
            documents=manifest.sample.documents,
            tokens=manifest.sample.tokens,
            groups=len(manifest.groups),
            created=manifest.created.timestamp(),
        )
