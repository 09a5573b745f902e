"""Writes the golden prefix artifacts of a format version. Run once per version; a file is never made again.

python tests/golden/make_prefix_golden.py tests/golden
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from calibrated_prefixes import (
    integer_manifest,
    integer_tensors,
    packed_manifest,
    packed_tensors,
    shared_manifest,
    shared_tensors,
)
from golden_numbers import FINGERPRINT, TOKEN_IDS, ramp

from xkv_artifacts.format import write_prefix
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import (
    DocumentRef,
    Fidelity,
    GroupLayout,
    ModelIdentity,
    PrefixManifest,
    StateLayout,
    StateShape,
    WindowLayout,
)

SPEC = {
    "group_size": 2,
    "ratio": None,
    "rank_k": 65,
    "rank_v": 66,
    "key_share": 0.4,
    "dtype": "bfloat16",
    "factor_dtype": "bfloat16",
    "index": "sketch",
    "sketch_planes": 2,
    "landmark_chunk": 8,
    "sink": 3,
    "recent": 1,
    "outlier_chunks": 0,
    "key_weights": "none",
    "value_weights": "output",
}


def golden_tensors() -> dict[str, torch.Tensor]:
    tokens = len(TOKEN_IDS)
    tensors = {
        "tokens": torch.tensor(TOKEN_IDS, dtype=torch.int32),
        "layer.2.window.keys": ramp(torch.bfloat16, 8, 2, 8),
        "layer.2.window.values": ramp(torch.bfloat16, 8, 2, 4),
        "rotary.0.planes": torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]], dtype=torch.int32),
        "rotary.0.scaling": torch.tensor([1.0], dtype=torch.float64),
        "rotary.0.rounding": torch.tensor([1], dtype=torch.int32),
        "rotary.0.inv_freq": torch.tensor([1.0, 0.5, 0.25, 0.125]),
    }
    for kind, widths, columns in (("key", (64, 1), 32), ("value", (64, 2), 16)):
        for block, width in enumerate(widths):
            tensors[f"group.0.{kind}.factors.{block}"] = ramp(torch.bfloat16, tokens, width)
            tensors[f"group.0.{kind}.bases.{block}"] = ramp(torch.bfloat16, width, columns)
    for layer in (0, 1):
        codes = torch.arange(tokens * 4) % 256
        tensors |= {
            f"layer.{layer}.sketch.planes": torch.tensor(
                [[[0, 4], [1, 5]], [[3, 7], [2, 6]]], dtype=torch.int16
            ),
            f"layer.{layer}.sketch.codes": codes.to(torch.uint8).reshape(tokens, 2, 2),
            f"layer.{layer}.sketch.scales": ramp(torch.float16, tokens, 2),
            f"layer.{layer}.exact.positions": torch.tensor([0, 1, 2, 129], dtype=torch.int32),
            f"layer.{layer}.exact.keys": ramp(torch.bfloat16, 4, 2, 8),
            f"layer.{layer}.exact.values": ramp(torch.bfloat16, 4, 2, 4),
        }
    return tensors


def golden_manifest() -> PrefixManifest:
    return PrefixManifest(
        id=artifact_id(FINGERPRINT, "golden.v1", TOKEN_IDS, SPEC),
        model=ModelIdentity(
            fingerprint=FINGERPRINT, name="acme/tiny", architecture="Llama", dtype="bfloat16"
        ),
        namespace="golden.v1",
        spec=SPEC,
        tokens=len(TOKEN_IDS),
        bytes_full=1_000_000,
        groups=(
            GroupLayout(
                layers=(0, 1),
                kv_heads=(2, 2),
                key_widths=(16, 16),
                value_widths=(8, 8),
                rotary=(0, 0),
                rank_k=65,
                rank_v=66,
            ),
        ),
        windows=(WindowLayout(layer=2, tokens=8, kv_heads=2, head_dim=8, value_dim=4),),
        document=DocumentRef(uri='corpus/größe "quoted"\n.txt', sha256="fedcba9876543210" * 4),
        fidelity=Fidelity(
            top1_agreement=0.96875, kl=0.015625, positions=32, key_error=(0.25,), value_error=(0.5,)
        ),
        created=datetime(2026, 11, 22, 9, 0, 0, 123456, tzinfo=timezone.utc),
    )


def latent_tensors() -> dict[str, torch.Tensor]:
    """Two layers of latent attention and one of linear attention."""
    tokens = len(TOKEN_IDS)
    tensors = {
        "tokens": torch.tensor(TOKEN_IDS, dtype=torch.int32),
        "rotary.0.planes": torch.empty(0, 2, dtype=torch.int32),
        "rotary.0.scaling": torch.tensor([1.0], dtype=torch.float64),
        "rotary.0.rounding": torch.tensor([0], dtype=torch.int32),
        "layer.1.state.conv.0": ramp(torch.bfloat16, 6, 4),
        "layer.1.state.conv.1": ramp(torch.bfloat16, 3, 4),
        "layer.1.state.recurrent.0": ramp(torch.float32, 2, 3, 5),
    }
    for block, width in enumerate((64, 1)):
        tensors[f"group.0.key.factors.{block}"] = ramp(torch.bfloat16, tokens, width)
        tensors[f"group.0.key.bases.{block}"] = ramp(torch.bfloat16, width, 80)
    for layer in (0, 2):
        tensors[f"layer.{layer}.rope_key"] = ramp(torch.bfloat16, tokens, 8)
        tensors[f"layer.{layer}.exact.positions"] = torch.tensor([0, 1, 2, 129], dtype=torch.int32)
        tensors[f"layer.{layer}.exact.keys"] = ramp(torch.bfloat16, 4, 1, 40)
    return tensors


def latent_manifest() -> PrefixManifest:
    group = GroupLayout(
        layers=(0, 2),
        kv_heads=(1, 1),
        key_widths=(40, 40),
        value_widths=(0, 0),
        rotary=(0, 0),
        rank_k=65,
        rank_v=0,
        rope_widths=(8, 8),
    )
    state = StateLayout(
        layer=1,
        conv=(StateShape(shape=(6, 4), dtype="bfloat16"), StateShape(shape=(3, 4), dtype="bfloat16")),
        recurrent=(StateShape(shape=(2, 3, 5), dtype="float32"),),
    )
    return golden_manifest().model_copy(
        update={
            "id": artifact_id(FINGERPRINT, "golden.v1", TOKEN_IDS, SPEC | {"value_weights": "none"}),
            "spec": SPEC | {"value_weights": "none"},
            "groups": (group,),
            "windows": (),
            "states": (state,),
            "fidelity": Fidelity(
                top1_agreement=0.96875, kl=0.015625, positions=32, key_error=(0.25,), value_error=(0.0,)
            ),
        }
    )


GOLDEN = {
    "prefix-v1.safetensors": (golden_manifest, golden_tensors),
    "prefix-v1-latent.safetensors": (latent_manifest, latent_tensors),
    "prefix-v1-packed.safetensors": (packed_manifest, packed_tensors),
    "prefix-v1-shared.safetensors": (shared_manifest, shared_tensors),
    "prefix-v1-integers.safetensors": (integer_manifest, integer_tensors),
}


def main() -> None:
    for name, (manifest, tensors) in GOLDEN.items():
        target = Path(sys.argv[1]) / name
        if target.exists():
            print(f"{target} exists: a golden file is made once and kept")
            continue
        with target.open("wb") as file:
            write_prefix(file, manifest(), tensors())


if __name__ == "__main__":
    main()
