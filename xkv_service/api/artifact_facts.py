"""`ArtifactFacts`: what decides whether an artifact may be used."""

from __future__ import annotations

from dataclasses import dataclass

from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.origin import Origin


@dataclass(frozen=True)
class ArtifactFacts:
    """Of one artifact, for one model: they never change under one id.

    Args:
        other_model: which one made it, and what of it is another, in words; None: this model did.
        whole_only: it serves whole or not at all. fidelity: top-1 agreement with the exact cache, 0 to 1.
    """

    other_model: str | None
    origin: Origin
    whole_only: bool
    fidelity: float

    @classmethod
    def of(cls, manifest: PrefixManifest, model: ModelIdentity) -> ArtifactFacts:
        """From the artifact's manifest, for `model`."""
        return cls(
            _unlike(manifest.model, model),
            Origin.of_manifest(manifest),
            bool(manifest.windows or manifest.states),
            manifest.fidelity.top1_agreement,
        )


def _unlike(maker: ModelIdentity, model: ModelIdentity) -> str | None:
    if maker.fingerprint == model.fingerprint:
        return None
    differs = maker.differs_from(model)
    return f"{maker.name}: {differs}" if differs else maker.name
