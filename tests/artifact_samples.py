"""Small but complete prefix artifacts for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, Fidelity, GroupLayout, ModelIdentity, PrefixManifest
from xkv_artifacts.session_format import SessionManifest

FINGERPRINT = "f" * 64
SPEC: dict[str, Any] = {"group_size": 2, "ratio": 8.0, "dtype": "bfloat16"}


def sample(
    token_ids: Sequence[int] = tuple(range(100)),
    *,
    seed: int = 0,
    namespace: str = "default",
    fingerprint: str = FINGERPRINT,
    spec: Mapping[str, Any] = SPEC,
    uri: str = "corpus/lisbon.txt",
) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
    """One group of two layers, rank 70 in two column blocks, with sketches and exact tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(token_ids)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "tokens": torch.tensor(token_ids, dtype=torch.int32),
        "rotary.0.inv_freq": normal(4, dtype=torch.float32),
        "layer.1.exact.positions": torch.arange(min(tokens, 4), dtype=torch.int32),
        "layer.1.window.keys": normal(0, 2, 8),
    }
    for kind in ("key", "value"):
        for block, width in enumerate((64, 6)):
            tensors[f"group.0.{kind}.factors.{block}"] = normal(tokens, width)
            tensors[f"group.0.{kind}.bases.{block}"] = normal(width, 32)
    codes = torch.randint(0, 256, (tokens, 2, 8), generator=generator, dtype=torch.uint8)
    tensors["layer.0.sketch.codes"] = codes
    tensors["layer.0.sketch.scales"] = normal(tokens, 2, dtype=torch.float16)
    manifest = PrefixManifest(
        id=artifact_id(fingerprint, namespace, token_ids, spec),
        model=ModelIdentity(fingerprint=fingerprint, name="tiny", architecture="Llama", dtype="bfloat16"),
        namespace=namespace,
        spec=dict(spec),
        tokens=tokens,
        bytes_full=tokens * 4096,
        groups=(
            GroupLayout(
                layers=(0, 1),
                kv_heads=(2, 2),
                key_widths=(16, 16),
                value_widths=(16, 16),
                rotary=(0, 0),
                rank_k=70,
                rank_v=70,
            ),
        ),
        document=DocumentRef(uri=uri, sha256="d" * 64),
        fidelity=Fidelity(top1_agreement=0.75, kl=0.5, positions=4, key_error=(0.25,), value_error=(0.125,)),
        created=datetime(2026, 11, 22, 8, 0, tzinfo=timezone.utc),
    )
    return manifest, tensors


def tail_sample(token_ids: Sequence[int], **fields: Any) -> tuple[SessionManifest, dict[str, torch.Tensor]]:
    """The tail of a conversation behind the first ten of its tokens."""
    given: dict[str, Any] = {"artifact": "a" * 64, "selection": {"budget": 8}, "prefix_tokens": 10, **fields}
    manifest = SessionManifest(
        model=ModelIdentity(fingerprint=FINGERPRINT, name="tiny", architecture="Llama", dtype="float32"),
        tokens=len(token_ids),
        folded=(),
        system_prompt=None,
        template="raw",
        messages=(),
        created=datetime(2026, 11, 22, 8, 0, tzinfo=timezone.utc),
        **given,
    )
    return manifest, {
        "tokens": torch.tensor(token_ids, dtype=torch.int32),
        "layer.0.tail.keys": torch.ones(800),
    }
