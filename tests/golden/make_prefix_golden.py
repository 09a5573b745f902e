"""Writes the golden prefix artifact of a format version. Run once per version; the file is never made again.

python tests/golden/make_prefix_golden.py tests/golden/prefix-v1.safetensors
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from xkv_artifacts.format import write_prefix
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import (
    DocumentRef,
    Fidelity,
    GroupLayout,
    ModelIdentity,
    PrefixManifest,
    WindowLayout,
)

FINGERPRINT = "0123456789abcdef" * 4
TOKEN_IDS = tuple((37 * position + position * position) % 32_000 for position in range(130))
SPEC = {"group_size": 2, "ratio": 8.0, "rank_k": None, "dtype": "bfloat16", "index": "sketch"}


def golden_tensors() -> dict[str, torch.Tensor]:
    """Numbers that anyone can work out: element i is (i mod 251 - 125) / 8, exact in every dtype."""

    def ramp(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return ((torch.arange(torch.Size(shape).numel()) % 251 - 125) / 8).reshape(shape).to(dtype)

    tokens = len(TOKEN_IDS)
    return {
        "tokens": torch.tensor(TOKEN_IDS, dtype=torch.int32),
        "group.0.key.factors.0": ramp(torch.bfloat16, tokens, 4),
        "group.0.key.bases.0": ramp(torch.bfloat16, 4, 16),
        "group.0.value.factors.0": ramp(torch.bfloat16, tokens, 6),
        "group.0.value.bases.0": ramp(torch.bfloat16, 6, 16),
        "layer.0.sketch.planes": torch.arange(8, dtype=torch.int16).reshape(2, 2, 2),
        "layer.0.sketch.codes": (torch.arange(tokens * 4) % 256).to(torch.uint8).reshape(tokens, 2, 2),
        "layer.0.sketch.scales": ramp(torch.float16, tokens, 2),
        "layer.1.landmarks": ramp(torch.bfloat16, 17, 2, 4),
        "layer.1.exact.positions": torch.tensor([0, 1, 129], dtype=torch.int32),
        "layer.1.exact.keys": ramp(torch.bfloat16, 3, 2, 4),
        "layer.1.exact.values": ramp(torch.bfloat16, 3, 2, 4),
        "layer.2.window.keys": ramp(torch.bfloat16, 8, 2, 4),
        "layer.2.window.values": ramp(torch.bfloat16, 8, 2, 4),
        "rotary.0.inv_freq": ramp(torch.float32, 2),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "scalar": torch.tensor(-7, dtype=torch.int64),
    }


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
                key_widths=(8, 8),
                value_widths=(8, 8),
                rotary=(0, 0),
                rank_k=4,
                rank_v=6,
            ),
        ),
        windows=(WindowLayout(layer=2, tokens=8, kv_heads=2, head_dim=4, value_dim=4),),
        document=DocumentRef(uri='corpus/größe "quoted"\n.txt', sha256="fedcba9876543210" * 4),
        fidelity=Fidelity(
            top1_agreement=0.96875, kl=0.015625, positions=32, key_error=(0.25,), value_error=(0.5,)
        ),
        created=datetime(2026, 11, 22, 9, 0, 0, 123456, tzinfo=timezone.utc),
    )


def main() -> None:
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} exists: a golden file is made once and kept")
    with target.open("wb") as file:
        write_prefix(file, golden_manifest(), golden_tensors())


if __name__ == "__main__":
    main()
