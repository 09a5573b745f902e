"""`ArtifactFacts`: what decides whether an artifact may be used."""

from __future__ import annotations

from dataclasses import dataclass

from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_service.api.settings import APISettings
from xkv_service.engine.messages import PartOffer
from xkv_service.engine.parts import part_offers


@dataclass(frozen=True)
class ArtifactFacts:
    """Of one artifact, for one model and server: they do not change under one id.

    Args:
        other_model: which one made it, and what of it is another, in words; None: this model did.
        whole_only: it serves whole or not at all. fidelity: top-1 agreement with the exact cache, 0 to 1.
        parts: those that the server may use. One that is made again may have others: its load compares.
    """

    other_model: str | None
    origin: Origin
    whole_only: bool
    fidelity: float
    parts: tuple[PartOffer, ...]

    @classmethod
    def of(cls, manifest: PrefixManifest, model: ModelIdentity, settings: APISettings) -> ArtifactFacts:
        """From the artifact's manifest, for `model`."""
        return cls(
            _unlike(manifest.model, model),
            Origin.of_manifest(manifest),
            bool(manifest.windows or manifest.states),
            manifest.fidelity.top1_agreement,
            part_offers(manifest, settings.part_kl, settings.min_fidelity),
        )


def _unlike(maker: ModelIdentity, model: ModelIdentity) -> str | None:
    if maker.fingerprint == model.fingerprint:
        return None
    differs = maker.differs_from(model)
    return f"{maker.name}: {differs}" if differs else maker.name
