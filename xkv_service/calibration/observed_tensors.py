"""What was observed of a sample as plain tensors: how it travels between processes and is kept in files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from xkv_artifacts.errors import CorruptArtifact
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
        CorruptArtifact: as `check_observed`.
    """
    check_observed(tensors, layout, settings)
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


def check_observed(
    tensors: Mapping[str, torch.Tensor], layout: ModelLayout, settings: CalibrationSettings
) -> None:
    """See that tensors are what `observed_tensors` makes of one document or more.

    Raises:
        CorruptArtifact: one is missing, unknown, or not of the shape and dtype it must have.
    """
    layers = calibrated_layers(layout)
    empty = Moments.empty(layers, reach_of(layout, settings), torch.device("meta"))
    latent = layers[0].kind == "latent"
    wanted: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {"counts": (torch.int64, (2,))}
    for kind in empty.kinds:
        moments = empty.kind(kind)
        for name, sums in ((f"{kind}.products", moments.products), (f"{kind}.sums", moments.sums)):
            wanted |= {f"{name}.{place}": (one.dtype, tuple(one.shape)) for place, one in enumerate(sums)}
    for place, layer in enumerate(layers):
        dim = None if latent else layer.head_dim
        wanted[f"queries.{place}"] = (torch.float64, (layer.query_heads, dim, dim))
        if not latent:
            wanted[f"planes.{place}"] = (torch.int64, (None, 2))
    if differing := sorted(tensors.keys() ^ wanted.keys()):
        known = "unknown" if differing[0] in tensors else "missing"
        raise CorruptArtifact(f"sum {differing[0][:40]} is {known}")
    for name, (dtype, shape) in wanted.items():
        _check_tensor(name, tensors[name], dtype, shape)
    if int(tensors["counts"].min()) < 1:
        raise CorruptArtifact("sums of no tokens")


def _check_tensor(name: str, found: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = found.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, found.shape, strict=True)
    )
    if found.dtype != dtype or not fits:
        raise CorruptArtifact(f"sum {name} is {found.dtype} {list(found.shape)}")


def _numbered(name: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{place}": tensor.cpu().contiguous() for place, tensor in enumerate(tensors)}
