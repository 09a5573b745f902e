"""Small but complete calibrations for tests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import torch

from xkv_artifacts.calibration_format import CalibrationManifest, CalibrationSample
from xkv_artifacts.keys import sample_sha256
from xkv_artifacts.manifest import ModelIdentity

FINGERPRINT = "f" * 64
DOCUMENTS = (tuple(range(50)), tuple(range(30)))
SETTINGS: dict[str, Any] = {"group_size": 2, "ridge": 0.5}
FIGURES: dict[str, Any] = {"seconds": 1.5, "kept": "all", "errors": {"key": [0.25, 0.125]}}
GROUPS = ((0, 1), (2, 3))
_MADE = datetime(2026, 11, 26, 8, 0, tzinfo=timezone.utc)


def calibration(
    *,
    seed: int = 0,
    fingerprint: str = FINGERPRINT,
    settings: Mapping[str, Any] = SETTINGS,
    documents: tuple[tuple[int, ...], ...] = DOCUMENTS,
    hours: int = 0,
) -> tuple[CalibrationManifest, dict[str, torch.Tensor]]:
    """Two groups of two layers, one head of four dimensions, six directions; made `hours` after eight."""
    manifest = CalibrationManifest(
        model=ModelIdentity(fingerprint=fingerprint, name="tiny", architecture="Llama", dtype="bfloat16"),
        sample=CalibrationSample(
            documents=len(documents), tokens=sum(map(len, documents)), sha256=sample_sha256(documents)
        ),
        settings=dict(settings),
        groups=GROUPS,
        figures=FIGURES,
        created=_MADE + timedelta(hours=hours),
    )
    return manifest, _tensors(seed)


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for group, layers in enumerate(GROUPS):
        for kind in ("key", "value"):
            tensors[f"group.{group}.{kind}.bases"] = torch.randn(6, 8, generator=generator)
            energies = torch.rand(8, generator=generator).sort(descending=True).values
            tensors[f"group.{group}.{kind}.energies"] = energies
            for layer in layers:
                tensors[f"layer.{layer}.{kind}.metric"] = torch.eye(4)[None]
        for layer in layers:
            tensors[f"layer.{layer}.planes"] = torch.tensor([[[0, 2], [1, 3]]], dtype=torch.int16)
    return tensors
