"""What tests of compressed prefixes share: token ids and manifests."""

from __future__ import annotations

from datetime import datetime, timezone

import torch

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity, PrefixManifest
from xkv_service.factors import PrefixFactors


def random_ids(count: int, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    """int64 [count], without the special tokens of the tiny models."""
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def manifest_of(factors: PrefixFactors) -> PrefixManifest:
    """A manifest as the worker would write it, once through JSON."""
    fields = factors.manifest_fields()
    manifest = PrefixManifest(
        id=artifact_id("0" * 64, "default", factors.token_ids.tolist(), fields["spec"]),
        model=ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32"),
        namespace="default",
        document=DocumentRef(uri="file:///document.txt", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    return PrefixManifest.model_validate_json(manifest.model_dump_json())
