"""Writes the golden calibrations of a format version. Run once per version; a file is never made again.

python tests/golden/make_calibration_golden.py tests/golden
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from golden_numbers import FINGERPRINT, TOKEN_IDS, ramp

from xkv_artifacts.calibration_format import (
    CalibrationManifest,
    CalibrationSample,
    identified,
    write_calibration,
)
from xkv_artifacts.keys import sample_sha256
from xkv_artifacts.manifest import ModelIdentity

GROUPS = ((0, 1), (3, 4))
DOCUMENTS = (TOKEN_IDS, TOKEN_IDS[:7])


def golden_calibration_tensors() -> dict[str, torch.Tensor]:
    """Layers of one head of four dimensions: 8 features a group, of which 5 or 3 directions are kept."""
    tensors = {}
    for group, layers in enumerate(GROUPS):
        for kind, rank in (("key", 5), ("value", 3)):
            tensors[f"group.{group}.{kind}.bases"] = ramp(torch.float32, rank, 8)
            tensors[f"group.{group}.{kind}.energies"] = ramp(torch.float32, 8).abs()
            for layer in layers:
                uneven = ramp(torch.float32, 1, 4, 4)
                tensors[f"layer.{layer}.{kind}.metric"] = uneven + uneven.mT + 400 * torch.eye(4)
        for layer in layers:
            tensors[f"layer.{layer}.planes"] = torch.tensor([[[1, 3], [0, 2]]], dtype=torch.int16)
    return tensors


def golden_calibration_manifest() -> CalibrationManifest:
    manifest = CalibrationManifest(
        model=ModelIdentity(
            fingerprint=FINGERPRINT, name="acme/tiny", architecture="Llama", dtype="bfloat16"
        ),
        sample=CalibrationSample(
            documents=len(DOCUMENTS), tokens=sum(map(len, DOCUMENTS)), sha256=sample_sha256(DOCUMENTS)
        ),
        settings={"group_size": 2, "ratio": 8.0, "ridge": 0.001, "text": "Größe", "limit": None},
        groups=GROUPS,
        figures={"seconds": 1.5, "note": "漢字 🙂", "kept": {"key": [5, 5], "value": [3, 3]}},
        created=datetime(2026, 11, 26, 8, 0, 0, 123456, tzinfo=timezone.utc),
    )
    return identified(manifest, golden_calibration_tensors())


def shared_calibration_tensors() -> dict[str, torch.Tensor]:
    """The same groups in the other order, and no two bases alike: for a prefix that shares them."""
    tensors = golden_calibration_tensors()
    for number, name in enumerate(sorted(name for name in tensors if name.endswith(".bases"))):
        tensors[name] = tensors[name] + 2 * number
    return tensors


def shared_calibration_manifest() -> CalibrationManifest:
    manifest = golden_calibration_manifest().model_copy(update={"groups": GROUPS[::-1], "tensors": {}})
    return identified(manifest, shared_calibration_tensors())


def kept_calibration_tensors() -> dict[str, torch.Tensor]:
    """With statistics: of each layer the products with the next one, none of the last."""
    tensors = golden_calibration_tensors()
    layers = [layer for group in GROUPS for layer in group]
    tensors["statistics.counts"] = torch.tensor([40, 9])
    tensors["statistics.documents"] = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    for layer in layers:
        for kind in ("key", "value"):
            name = f"statistics.layer.{layer}.{kind}"
            tensors[f"{name}.moments"] = ramp(torch.float32, 10)
            tensors[f"{name}.cross"] = ramp(torch.float32, 4, 4 if layer != layers[-1] else 0)
            tensors[f"{name}.mean"] = ramp(torch.float32, 4)
        tensors[f"statistics.layer.{layer}.queries"] = ramp(torch.float32, 2, 10)
    return tensors


def kept_calibration_manifest() -> CalibrationManifest:
    return identified(golden_calibration_manifest(), kept_calibration_tensors())


GOLDEN = {
    "calibration-v1.safetensors": (golden_calibration_manifest, golden_calibration_tensors),
    "calibration-v1-shared.safetensors": (shared_calibration_manifest, shared_calibration_tensors),
    "calibration-v2.safetensors": (kept_calibration_manifest, kept_calibration_tensors),
}


def main() -> None:
    for name, (manifest, tensors) in GOLDEN.items():
        target = Path(sys.argv[1]) / name
        if target.exists():
            print(f"{target} exists: a golden file is made once and kept")
            continue
        with target.open("xb") as file:
            write_calibration(file, manifest(), tensors())


if __name__ == "__main__":
    main()
