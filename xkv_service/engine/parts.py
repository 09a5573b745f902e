"""Parts of artifacts in an engine: which may serve, and what they are called among resident prefixes."""

from __future__ import annotations

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import PartFidelity, PrefixManifest
from xkv_service.engine.messages import PartOffer

_PART = " part "
LEAST_POSITIONS = 64
"""That a part must have been measured at, as those were that the bound was tried on (docs/serving.md)."""
_MOST_TENSORS = 4096
"""Of an artifact that offers parts: to look at more would keep a server busy with one header."""


def resident_key(artifact_id: str, part: PartFidelity | None) -> str:
    """What an artifact is called among resident prefixes, or a part of it."""
    return artifact_id if part is None else f"{artifact_id}{_PART}{part.share!r}"


def is_part(key: str) -> bool:
    """Whether a resident prefix is a part of an artifact."""
    return _PART in key


def artifact_of(key: str) -> str:
    """The artifact that a resident prefix is, or is a part of."""
    return key.partition(_PART)[0]


def part_offers(manifest: PrefixManifest, kl: float, agreement: float) -> tuple[PartOffer, ...]:
    """The parts of an artifact that are near enough to the exact cache, smallest first.

    None of an artifact with bases of its own: where its columns do not stand in the order in which a
    calibration's questions need them, parts lose answers however near they are (docs/serving.md).

    Args:
        kl: nats of divergence that a part may have; 0: there are none. agreement: that it must have.
    """
    near = [part for part in manifest.fidelity.parts if part.kl <= kl and part.top1_agreement >= agreement]
    few = manifest.fidelity.positions < LEAST_POSITIONS
    if not near or not kl or few or len(manifest.tensors) > _MOST_TENSORS:
        return ()
    # They bring torch, for which those who find no part have not to wait.
    from xkv_service.leading_part import part_manifest
    from xkv_service.manifest_checks import checked_spec
    from xkv_service.stored import artifact_bytes

    try:
        spec = checked_spec(manifest, len(manifest.tensors))
    except CorruptArtifact:  # whoever loads it says so
        return ()
    if spec.basis != "calibrated":
        return ()
    whole = artifact_bytes(manifest, spec)
    offers: dict[int, PartOffer] = {}  # of parts with the same columns one
    for part in near:
        nbytes = artifact_bytes(part_manifest(manifest, spec, part.share), spec)
        if nbytes < whole:
            offers.setdefault(nbytes, PartOffer(part, nbytes, whole))
    return tuple(offers.values())
