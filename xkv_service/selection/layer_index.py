"""Selection index and exact tokens of every compressed layer, read from a prefill in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xkv_service.calibration.calibration import Calibration
from xkv_service.kernels.probe import has_kernels
from xkv_service.modeling.layout import LayerLayout
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.exact import ExactTokens, exact_positions, outlier_range
from xkv_service.selection.landmarks import chunk_likeness, landmarks, outlier_chunks
from xkv_service.selection.sketch import KeySketch, candidate_planes, choose_planes, encode
from xkv_service.spec import CompressionSpec
from xkv_service.stored import DTYPES, sketch_planes

_CHUNK = 32768


@dataclass(frozen=True)
class LayerIndex:
    """By layer: sketches, planes of a sketch to be derived, or landmarks (or none), and exact tokens."""

    planes: dict[int, torch.Tensor]
    sketches: dict[int, KeySketch]
    landmarks: dict[int, torch.Tensor]
    exact: dict[int, ExactTokens]


def index_layers(
    exact: Prefill,
    spec: CompressionSpec,
    key_energy: Mapping[int, torch.Tensor],
    calibration: Calibration | None = None,
) -> LayerIndex:
    """Selection index and exact tokens of every compressed layer.

    Args:
        key_energy: by layer, mean square of the keys [kv_heads, D]; not needed with a calibration.
        calibration: where the planes of sketches come from, instead of this prefix's energies.
    """
    index = LayerIndex({}, {}, {}, {})
    planes: dict[int, torch.Tensor] = {}
    if spec.index in ("sketch", "derived"):
        planes = (
            _calibrated_planes(exact, spec, calibration)
            if calibration is not None
            else _sketch_planes(exact, spec, key_energy)
        )
    for layer in exact.layout.compressible:
        # Latent layers' leading columns of factors are an index already.
        if layer.kind != "latent" and layer.index not in spec.reuse:
            if spec.index == "landmark":
                index.landmarks[layer.index] = _landmarks(exact, spec, layer.index).to(DTYPES[spec.dtype])
            elif spec.index == "derived":
                index.planes[layer.index] = planes[layer.index]
            elif spec.index == "sketch":
                index.sketches[layer.index] = _sketch(exact, layer.index, planes[layer.index])
        kept = _exact(exact, spec, layer)
        if kept.positions.numel():
            index.exact[layer.index] = kept
    return index


def _sketch_planes(
    exact: Prefill, spec: CompressionSpec, key_energy: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """By layer that is not latent, the planes of its sketch: chosen at once for all layers of a kind."""
    kinds: dict[tuple[int, ...], list[LayerLayout]] = {}
    for layer in exact.layout.compressible:
        if layer.kind != "latent":
            heads = (layer.kv_heads, layer.query_heads, layer.head_dim)
            kinds.setdefault((*heads, *exact.planes(layer.index).flatten().tolist()), []).append(layer)
    planes: dict[int, torch.Tensor] = {}
    for layers in kinds.values():
        numbers, one = [layer.index for layer in layers], layers[0]
        chosen = choose_planes(
            torch.cat([key_energy[number] for number in numbers]),
            torch.cat([exact.query_energy(number) for number in numbers]),
            candidate_planes(exact.planes(one.index), one.head_dim),
            sketch_planes(spec, one.head_dim),
        )
        planes.update(zip(numbers, torch.split(chosen, one.kv_heads), strict=True))
    return planes


def _calibrated_planes(
    exact: Prefill, spec: CompressionSpec, calibration: Calibration
) -> dict[int, torch.Tensor]:
    return {
        layer.index: calibration.planes[layer.index][:, : sketch_planes(spec, layer.head_dim)].to(
            exact.device
        )
        for layer in exact.layout.compressible
        if layer.kind != "latent"
    }


def _sketch(exact: Prefill, layer: int, planes: torch.Tensor) -> KeySketch:
    step = exact.tokens if has_kernels(exact.device) else _CHUNK  # the kernel needs no memory
    pieces = [
        encode(exact.rotated_keys(layer, start, start + step), planes)
        for start in range(0, exact.tokens, step)
    ]
    return KeySketch(
        planes, torch.cat([codes for codes, _ in pieces]), torch.cat([scale for _, scale in pieces])
    )


def _spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """Spans of about 32768 tokens that begin where a landmark begins."""
    step = max(1, _CHUNK // chunk) * chunk
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _landmarks(exact: Prefill, spec: CompressionSpec, layer: int) -> torch.Tensor:
    spans = _spans(exact.tokens, spec.landmark_chunk)
    return torch.cat([landmarks(exact.rotated_keys(layer, *span), spec.landmark_chunk) for span in spans])


def _outliers(exact: Prefill, spec: CompressionSpec, layer: int) -> list[int]:
    if not spec.outlier_chunks:
        return []
    spans = _spans(exact.tokens, spec.landmark_chunk)
    likeness = [chunk_likeness(exact.rotated_keys(layer, *span), spec.landmark_chunk) for span in spans]
    return outlier_chunks(torch.cat(likeness), spec.outlier_chunks, *outlier_range(exact.tokens, spec))


def _exact(exact: Prefill, spec: CompressionSpec, layer: LayerLayout) -> ExactTokens:
    positions = exact_positions(exact.tokens, spec, _outliers(exact, spec, layer.index))
    dtype = DTYPES[spec.dtype]
    runs = _runs(positions)
    width = 0 if layer.kind == "latent" else layer.value_dim  # rotated keys are exact for every token
    keys = [exact.keys(layer.index, *run).to(dtype) for run in runs]
    values = [exact.values(layer.index, *run)[..., :width].to(dtype) for run in runs]
    where = torch.tensor(positions, dtype=torch.int32).to(exact.device, non_blocking=True)
    if not runs:
        return ExactTokens(where, torch.empty(0), torch.empty(0))
    return ExactTokens(where, torch.cat(keys), torch.cat(values))


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Ascending positions as half-open runs of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
