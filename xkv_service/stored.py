"""Which tensors a prefix artifact holds: names, shapes and dtypes, known before anything is computed.

The byte accounting sums this table, the writer fills it, and the reader checks a file against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from xkv_artifacts.manifest import GroupLayout, PrefixManifest, StateLayout, WindowLayout
from xkv_service.packed_factors import Runs, column_blocks, packed_width, rank_of
from xkv_service.selection.exact import exact_count
from xkv_service.spec import CompressionSpec

RANK_BLOCK = 64

DTYPES = {
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of one tensor in a blob."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


Table = Iterator[tuple[str, StoredTensor]]


def stored_tensors(
    spec: CompressionSpec,
    tokens: int,
    groups: Sequence[GroupLayout],
    windows: Sequence[WindowLayout] = (),
    states: Sequence[StateLayout] = (),
) -> dict[str, StoredTensor]:
    """Every tensor of a prefix artifact but the `rotary.*` tables, by name."""
    table = {"tokens": StoredTensor((tokens,), torch.int32)}
    for number, group in enumerate(groups):
        table.update(group_tensors(spec, tokens, number, group))
    for window in windows:
        table.update(_window(spec, window))
    for state in states:
        table.update(_state(state))
    return table


def artifact_bytes(manifest: PrefixManifest, spec: CompressionSpec) -> int:
    """Bytes of all tensors in the blob, without header and rotary tables."""
    table = stored_tensors(spec, manifest.tokens, manifest.groups, manifest.windows, manifest.states)
    return sum(tensor.nbytes for tensor in table.values())


def group_tensors(
    spec: CompressionSpec, tokens: int, number: int, group: GroupLayout
) -> dict[str, StoredTensor]:
    """The tensors of one group and its layers, by name."""
    keys = runs_of(spec, group.rank_k, group.columns_k)
    values = runs_of(spec, group.rank_v, group.columns_v)
    table = dict(_factors(f"group.{number}.key", spec, tokens, keys, sum(group.key_widths)))
    table.update(_factors(f"group.{number}.value", spec, tokens, values, sum(group.value_widths)))
    layer = _latent_layer if group.latent else _layer
    for position in range(len(group.layers)):
        table.update(layer(spec, tokens, group, position))
    return table


def runs_of(spec: CompressionSpec, rank: int, columns: Runs) -> Runs:
    """Bits and number of the columns of token factors, 16 or 32 bits where they are floating point."""
    if columns or not rank:
        return columns
    return ((8 * DTYPES[spec.factor_dtype].itemsize, rank),)


def base_dtype(spec: CompressionSpec) -> torch.dtype:
    """The dtype that a document's own bases are stored in."""
    return DTYPES[spec.base_dtype or spec.dtype]


def sketch_planes(spec: CompressionSpec, head_dim: int) -> int:
    """Planes a sketch keeps of a head of `head_dim` dimensions."""
    return min(spec.sketch_planes, head_dim // 2)


def _factors(name: str, spec: CompressionSpec, tokens: int, runs: Runs, width: int) -> Table:
    for block, (start, stop, bits) in enumerate(column_blocks(runs, RANK_BLOCK)):
        dtype = torch.uint8 if bits < 8 else DTYPES.get(spec.factor_dtype, torch.int8)
        columns = packed_width(bits, stop - start) if bits < 8 else stop - start
        yield f"{name}.factors.{block}", StoredTensor((tokens, columns), dtype)
        if spec.basis == "document":
            yield f"{name}.bases.{block}", StoredTensor((stop - start, width), base_dtype(spec))
    if runs and (spec.basis == "calibrated" or spec.base_dtype is not None):
        yield f"{name}.scales", StoredTensor((rank_of(runs),), torch.float32)


def _layer(spec: CompressionSpec, tokens: int, group: GroupLayout, position: int) -> Table:
    heads = group.kv_heads[position]
    dim, value_dim = group.key_widths[position] // heads, group.value_widths[position] // heads
    name, dtype = f"layer.{group.layers[position]}", DTYPES[spec.dtype]
    if group.layers[position] not in spec.reuse:
        yield from _index(name, spec, tokens, heads, dim)
    if count := exact_count(tokens, spec):
        yield f"{name}.exact.positions", StoredTensor((count,), torch.int32)
        yield f"{name}.exact.keys", StoredTensor((count, heads, dim), dtype)
        yield f"{name}.exact.values", StoredTensor((count, heads, value_dim), dtype)


def _index(name: str, spec: CompressionSpec, tokens: int, heads: int, dim: int) -> Table:
    planes = sketch_planes(spec, dim)
    if spec.index in ("sketch", "derived"):
        yield f"{name}.sketch.planes", StoredTensor((heads, planes, 2), torch.int16)
    if spec.index == "sketch":
        yield f"{name}.sketch.codes", StoredTensor((tokens, heads, planes), torch.uint8)
        yield f"{name}.sketch.scales", StoredTensor((tokens, heads), torch.float16)
    if spec.index == "landmark":
        chunks = -(-tokens // spec.landmark_chunk)
        yield f"{name}.landmarks", StoredTensor((chunks, heads, dim), DTYPES[spec.dtype])


def _latent_layer(spec: CompressionSpec, tokens: int, group: GroupLayout, position: int) -> Table:
    """No selection index: the leading columns of the token factors are one, since latents do not turn."""
    name, dtype = f"layer.{group.layers[position]}", DTYPES[spec.dtype]
    yield f"{name}.rope_key", StoredTensor((tokens, group.rope_widths[position]), dtype)
    if count := exact_count(tokens, spec):
        yield f"{name}.exact.positions", StoredTensor((count,), torch.int32)
        yield f"{name}.exact.keys", StoredTensor((count, 1, group.key_widths[position]), dtype)


def _state(state: StateLayout) -> Table:
    for kind, tensors in (("conv", state.conv), ("recurrent", state.recurrent)):
        for number, tensor in enumerate(tensors):
            name = f"layer.{state.layer}.state.{kind}.{number}"
            yield name, StoredTensor(tensor.shape, DTYPES[tensor.dtype])


def _window(spec: CompressionSpec, window: WindowLayout) -> Table:
    name, dtype = f"layer.{window.layer}.window", DTYPES[spec.dtype]
    yield f"{name}.keys", StoredTensor((window.tokens, window.kv_heads, window.head_dim), dtype)
    yield f"{name}.values", StoredTensor((window.tokens, window.kv_heads, window.value_dim), dtype)
