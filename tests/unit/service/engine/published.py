"""Artifacts in a store, as the workers would have published them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from compressed import manifest_of, random_ids
from transformers import PreTrainedModel

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.calibration.calibration import Calibration
from xkv_service.factors import PrefixFactors

FINGERPRINT = "0" * 64
SPEC = CompressionSpec(group_size=3, rank_k=24, rank_v=32)


def publish(store: ArtifactStore, factors: PrefixFactors, fingerprint: str = FINGERPRINT) -> str:
    """Put factors into a store; the artifact's id."""
    fields = manifest_of(factors).model_dump()
    fields["model"]["fingerprint"] = fingerprint
    fields["id"] = artifact_id(fingerprint, "default", factors.token_ids.tolist(), fields["spec"])
    return store.publish(PrefixManifest(**fields), factors.to_tensors()).id


def publish_some(
    store: ArtifactStore,
    model: PreTrainedModel,
    sizes: Sequence[int],
    spec: CompressionSpec = SPEC,
    calibration: Calibration | None = None,
) -> list[str]:
    """Compress and publish random prefixes of so many tokens each."""
    return [
        publish(store, compress(model, random_ids(size, seed=place), spec, calibration))
        for place, size in enumerate(sizes)
    ]


def prompt_logits(model: PreTrainedModel, cache: object) -> torch.Tensor:
    """Logits of five tokens behind what a cache holds, inside `enable_xkv`."""
    with torch.no_grad():
        logits: torch.Tensor = model(random_ids(5, seed=3)[None], past_key_values=cache).logits
    return logits
