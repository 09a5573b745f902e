"""What was observed of a sample as plain tensors: how it travels between processes and is kept in files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from xkv_service.calibration.calibration import KINDS
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.observed import Observed, calibrated_layers, reach_of
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.modeling.layout import ModelLayout


def observed_tensors(found: Observed) -> dict[str, torch.Tensor]:
    """Every sum under a name of its own, on the CPU; `counts` is int64 [tokens, tokens of probes]."""
    named = {"counts": torch.tensor([found.moments.tokens, found.query_tokens])}
    for kind in KINDS:
        moments = found.moments.kind(kind)
        named |= _numbered(f"{kind}.products", moments.products) | _numbered(f"{kind}.sums", moments.sums)
    return named | _numbered("queries", found.queries) | _numbered("planes", found.planes)


def observed_of(
    tensors: Mapping[str, torch.Tensor],
    layout: ModelLayout,
    settings: CalibrationSettings,
    device: torch.device | None = None,
) -> Observed:
    """What `observed_tensors` was called on, in tensors of its own.

    Args:
        layout, settings: of the model, and those it was observed with.
        device: None is the CPU.

    Raises:
        KeyError: a sum is missing.
    """
    layers = calibrated_layers(layout)
    count = len(layers)
    own = {name: tensor.to(device or "cpu", copy=True) for name, tensor in tensors.items()}
    moments = Moments.empty(layers, reach_of(layout, settings), device or torch.device("cpu"))
    for kind in moments.kinds:
        part = moments.kind(kind)
        part.products = [own[f"{kind}.products.{place}"] for place in range(count)]
        part.sums = [own[f"{kind}.sums.{place}"] for place in range(count)]
    moments.tokens, query_tokens = own["counts"].tolist()
    queries = [own[f"queries.{place}"] for place in range(count)]
    planes = [own[f"planes.{place}"] for place in range(count) if f"planes.{place}" in own]
    return Observed(moments, queries, query_tokens, planes)


def _numbered(name: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{place}": tensor.cpu().contiguous() for place, tensor in enumerate(tensors)}
