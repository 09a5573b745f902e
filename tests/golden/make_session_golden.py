"""Writes the golden session of a format version. Run once per version; the file is never made again.

python tests/golden/make_session_golden.py tests/golden/session-v1.xkv
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from golden_numbers import FINGERPRINT, TOKEN_IDS
from make_prefix_golden import SPEC

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.session_format import Message, SessionManifest, save_session

DOCUMENT = 'Größe "A"\n漢字 🙂'
TAIL_IDS = tuple((53 * position + 7) % 32_000 for position in range(40))


def golden_session_tensors() -> dict[str, torch.Tensor]:
    """Numbers that anyone can work out: element i is (i mod 251 - 125) / 8, exact in every dtype."""

    def ramp(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return ((torch.arange(torch.Size(shape).numel()) % 251 - 125) / 8).reshape(shape).to(dtype)

    def bytes_of(*shape: int) -> torch.Tensor:
        return (torch.arange(torch.Size(shape).numel()) % 256).reshape(shape).to(torch.uint8)

    tensors = {
        "tokens": torch.tensor([*TOKEN_IDS, *TAIL_IDS], dtype=torch.int32),
        "document": torch.tensor(list(DOCUMENT.encode()), dtype=torch.uint8),
        "layer.2.window.keys": ramp(torch.bfloat16, 8, 2, 8),
        "layer.2.window.values": ramp(torch.bfloat16, 8, 2, 4),
        "layer.3.state.conv.0": ramp(torch.bfloat16, 6, 3),
        "layer.3.state.recurrent.0": ramp(torch.float32, 2, 4, 4),
    }
    for kind, rank, width in (("key", 65, 32), ("value", 66, 16)):
        tensors[f"fold.0.group.0.{kind}.factors"] = ramp(torch.int8, 30, rank + 2)
        tensors[f"fold.0.group.0.{kind}.scales"] = ramp(torch.float32, rank + 2)
        tensors[f"fold.0.group.0.{kind}.bases"] = ramp(torch.bfloat16, 2, width)
    for layer in (0, 1):
        tensors |= {
            f"layer.{layer}.tail.keys": ramp(torch.bfloat16, 10, 2, 8),
            f"layer.{layer}.tail.values": ramp(torch.bfloat16, 10, 2, 4),
            f"fold.0.layer.{layer}.sketch.codes": bytes_of(30, 2, 2),
            f"fold.0.layer.{layer}.sketch.scales": ramp(torch.float16, 30, 2),
        }
    return tensors


def golden_session_manifest() -> SessionManifest:
    return SessionManifest(
        model=ModelIdentity(
            fingerprint=FINGERPRINT, name="acme/tiny", architecture="Llama", dtype="bfloat16"
        ),
        artifact=artifact_id(FINGERPRINT, "golden.v1", TOKEN_IDS, SPEC),
        selection={"selector": "sketch", "budget": 0.0625, "granularity": "layer", "sink": 0, "recent": 0},
        tokens=len(TOKEN_IDS) + len(TAIL_IDS),
        prefix_tokens=len(TOKEN_IDS),
        folded=(30,),
        system_prompt='Say "ja".\n',
        template="chat",
        messages=(
            Message(role="user", content="Wie groß?"),
            Message(role="assistant", content="漢 🙂\n"),
        ),
        created=datetime(2026, 11, 22, 13, 0, 0, 123456, tzinfo=timezone.utc),
    )


def main() -> None:
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} exists: a golden file is made once and kept")
    save_session(target, golden_session_manifest(), golden_session_tensors())


if __name__ == "__main__":
    main()
