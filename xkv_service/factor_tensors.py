"""Prefix factors as named tensors and back, each name, shape and dtype checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import GroupLayout, PrefixManifest, StateLayout
from xkv_service.errors import InvalidSpec
from xkv_service.factors import GroupFactors, LayerWindow, LowRank, PrefixFactors
from xkv_service.modeling.linear_state import LayerState
from xkv_service.modeling.rotary import RotaryTable
from xkv_service.selection.exact import ExactTokens
from xkv_service.selection.sketch import KeySketch
from xkv_service.spec import CompressionSpec
from xkv_service.stored import RANK_BLOCK, StoredTensor, rank_blocks, stored_tensors

Tensors = Mapping[str, torch.Tensor]


def to_tensors(factors: PrefixFactors) -> dict[str, torch.Tensor]:
    """Every tensor under its stored name, on the CPU and contiguous."""
    tensors: dict[str, torch.Tensor] = {"tokens": factors.token_ids}
    for number, group in enumerate(factors.groups):
        tensors.update(_blocks(f"group.{number}.key", group.keys))
        if group.values is not None:
            tensors.update(_blocks(f"group.{number}.value", group.values))
    for layer, sketch in factors.sketches.items():
        tensors[f"layer.{layer}.sketch.planes"] = sketch.planes
        tensors[f"layer.{layer}.sketch.codes"] = sketch.codes
        tensors[f"layer.{layer}.sketch.scales"] = sketch.scales
    for layer, means in factors.landmarks.items():
        tensors[f"layer.{layer}.landmarks"] = means
    for layer, exact in factors.exact.items():
        tensors[f"layer.{layer}.exact.positions"] = exact.positions
        tensors[f"layer.{layer}.exact.keys"] = exact.keys
        if exact.values.shape[-1]:
            tensors[f"layer.{layer}.exact.values"] = exact.values
    for layer, keys in factors.rope_keys.items():
        tensors[f"layer.{layer}.rope_key"] = keys
    for layer, window in factors.windows.items():
        tensors[f"layer.{layer}.window.keys"] = window.keys
        tensors[f"layer.{layer}.window.values"] = window.values
    for layer, state in factors.states.items():
        for kind, states in (("conv", state.conv), ("recurrent", state.recurrent)):
            tensors.update({f"layer.{layer}.state.{kind}.{i}": one for i, one in enumerate(states)})
    for number, table in enumerate(factors.rotary):
        tensors.update({f"rotary.{number}.{name}": value for name, value in table.to_tensors().items()})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def from_tensors(manifest: PrefixManifest, tensors: Tensors) -> PrefixFactors:
    """Factors from a file's tensors.

    Raises:
        CorruptArtifact: names the first tensor that is not what the manifest says.
    """
    spec = _spec(manifest)
    _check_layout(manifest, len(tensors))
    table = stored_tensors(spec, manifest.tokens, manifest.groups, manifest.windows, manifest.states)
    _check(table, tensors)
    layers = [layer for group in manifest.groups for layer in group.layers]
    latent = {layer for group in manifest.groups if group.latent for layer in group.layers}
    indexed = [layer for layer in layers if layer not in latent]
    return PrefixFactors(
        spec=spec,
        bytes_full=manifest.bytes_full,
        token_ids=tensors["tokens"],
        groups=tuple(_group(number, group, tensors) for number, group in enumerate(manifest.groups)),
        rotary=_rotary(manifest, tensors),
        sketches={layer: _sketch(layer, manifest, tensors) for layer in indexed if spec.index == "sketch"},
        landmarks={
            layer: tensors[f"layer.{layer}.landmarks"] for layer in indexed if spec.index == "landmark"
        },
        exact={
            layer: _exact(layer, manifest.tokens, tensors)
            for layer in layers
            if f"layer.{layer}.exact.positions" in tensors
        },
        rope_keys={layer: tensors[f"layer.{layer}.rope_key"] for layer in layers if layer in latent},
        windows={
            window.layer: LayerWindow(
                tensors[f"layer.{window.layer}.window.keys"], tensors[f"layer.{window.layer}.window.values"]
            )
            for window in manifest.windows
        },
        states={state.layer: _state(state, tensors) for state in manifest.states},
        fidelity=manifest.fidelity,
    )


def _blocks(name: str, pair: LowRank) -> dict[str, torch.Tensor]:
    tensors = {}
    for block, (start, stop) in enumerate(rank_blocks(pair.rank)):
        tensors[f"{name}.factors.{block}"] = pair.factors[:, start:stop]
        tensors[f"{name}.bases.{block}"] = pair.bases[start:stop]
    return tensors


def _spec(manifest: PrefixManifest) -> CompressionSpec:
    try:
        return CompressionSpec.from_canonical(manifest.spec)
    except (InvalidSpec, TypeError) as error:
        raise CorruptArtifact(f"the compression spec in the header is not valid: {error}") from None


def _check_layout(manifest: PrefixManifest, tensors: int) -> None:
    """Heads, widths and ranks that belong together, before any shape is computed from them."""
    for number, group in enumerate(manifest.groups):
        lists = [group.kv_heads, group.key_widths, group.value_widths, group.rotary]
        lists += [group.rope_widths] * group.latent
        if not group.layers or any(len(one) != len(group.layers) for one in lists):
            raise CorruptArtifact(f"group {number} in the header does not describe each of its layers")
        _check_widths(number, group)
        if max(group.rank_k, group.rank_v) > tensors * RANK_BLOCK:
            raise CorruptArtifact(
                f"group {number} in the header has more ranks than the file has tensors for"
            )
    layers = [layer for group in manifest.groups for layer in group.layers]
    layers += [window.layer for window in manifest.windows]
    layers += [state.layer for state in manifest.states]
    if not manifest.groups or len(set(layers)) != len(layers) or min(layers) < 0:
        raise CorruptArtifact("the header names a layer twice, or none")


def _check_widths(number: int, group: GroupLayout) -> None:
    if group.latent:
        plain = set(group.kv_heads) == {1} and set(group.value_widths) == {0} and group.rank_v == 0
        if not plain or min(*group.key_widths, *group.rope_widths) < 1:
            raise CorruptArtifact(
                f"group {number} in the header: its widths are not those of latent attention"
            )
        return
    for heads, key, value in zip(group.kv_heads, group.key_widths, group.value_widths, strict=True):
        if heads < 1 or key < 1 or value < 1 or key % heads or value % heads:
            raise CorruptArtifact(
                f"group {number} in the header: {heads} heads do not divide {key} and {value}"
            )
    if group.rank_v < 1:
        raise CorruptArtifact(f"group {number} in the header has no rank for its values")


def _check(expected: Mapping[str, StoredTensor], tensors: Tensors) -> None:
    for name, wanted in expected.items():
        found = tensors.get(name)
        if found is None:
            raise CorruptArtifact(f"tensor {name} is missing")
        if tuple(found.shape) != wanted.shape or found.dtype != wanted.dtype:
            raise CorruptArtifact(
                f"tensor {name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
    for name in tensors:
        if name not in expected and not name.startswith("rotary."):
            raise CorruptArtifact(f"tensor {name} is not part of the format")


def _group(number: int, layout: GroupLayout, tensors: Tensors) -> GroupFactors:
    def pair(kind: str, rank: int, widths: tuple[int, ...]) -> LowRank:
        blocks = range(len(rank_blocks(rank)))
        name = f"group.{number}.{kind}"
        return LowRank(
            torch.cat([tensors[f"{name}.factors.{block}"] for block in blocks], dim=1),
            torch.cat([tensors[f"{name}.bases.{block}"] for block in blocks]),
            widths,
        )

    values = None if layout.latent else pair("value", layout.rank_v, layout.value_widths)
    return GroupFactors(layout, pair("key", layout.rank_k, layout.key_widths), values)


def _state(state: StateLayout, tensors: Tensors) -> LayerState:
    name = f"layer.{state.layer}.state"
    return LayerState(
        tuple(tensors[f"{name}.conv.{number}"] for number in range(len(state.conv))),
        tuple(tensors[f"{name}.recurrent.{number}"] for number in range(len(state.recurrent))),
    )


def _head_dim(layer: int, manifest: PrefixManifest) -> int:
    for group in manifest.groups:
        if layer in group.layers:
            position = group.layers.index(layer)
            return group.key_widths[position] // group.kv_heads[position]
    raise KeyError(layer)


def _sketch(layer: int, manifest: PrefixManifest, tensors: Tensors) -> KeySketch:
    planes = tensors[f"layer.{layer}.sketch.planes"]
    _check_range(f"layer.{layer}.sketch.planes", planes, _head_dim(layer, manifest))
    return KeySketch(planes, tensors[f"layer.{layer}.sketch.codes"], tensors[f"layer.{layer}.sketch.scales"])


def _exact(layer: int, tokens: int, tensors: Tensors) -> ExactTokens:
    name = f"layer.{layer}.exact"
    positions = tensors[f"{name}.positions"]
    _check_range(f"{name}.positions", positions, tokens)
    if not bool((positions[1:] > positions[:-1]).all()):
        raise CorruptArtifact(f"tensor {name}.positions is not in ascending order")
    keys = tensors[f"{name}.keys"]
    return ExactTokens(positions, keys, tensors.get(f"{name}.values", keys[..., :0]))


def _check_range(name: str, values: torch.Tensor, limit: int) -> None:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise CorruptArtifact(f"tensor {name} points outside 0 to {limit - 1}")


def _rotary(manifest: PrefixManifest, tensors: Tensors) -> tuple[RotaryTable, ...]:
    """The tables numbered 0 to n - 1 that the groups refer to."""
    uses = [number for group in manifest.groups for number in group.rotary]
    names = [name for name in tensors if name.startswith("rotary.")]
    numbers = {name.split(".")[1] for name in names}
    if numbers != {str(number) for number in uses}:
        raise CorruptArtifact("the rotary tables are not those that the header's layers refer to")
    tables = []
    for number in range(len(numbers)):
        prefix = f"rotary.{number}."
        mine = {name[len(prefix) :]: tensors[name] for name in names if name.startswith(prefix)}
        tables.append(_rotary_table(prefix, mine, _least_head_dim(manifest, number), manifest.tokens))
    return tuple(tables)


def _least_head_dim(manifest: PrefixManifest, table: int) -> int:
    return min(
        width // heads
        for group in manifest.groups
        for used, width, heads in zip(group.rotary, group.key_widths, group.kv_heads, strict=True)
        if used == table
    )


def _rotary_table(prefix: str, tensors: dict[str, torch.Tensor], head_dim: int, tokens: int) -> RotaryTable:
    planes = tensors.get("planes")
    if planes is None or planes.dtype != torch.int32 or planes.ndim != 2 or planes.shape[1] != 2:
        raise CorruptArtifact(f"tensor {prefix}planes is not int32 [P, 2]")
    _check_range(f"{prefix}planes", planes, head_dim)
    if len(set(planes.flatten().tolist())) != planes.numel():
        raise CorruptArtifact(f"tensor {prefix}planes names a dimension twice")
    count = planes.shape[0]
    if count and "inv_freq" not in tensors and not {"cos", "sin"} <= tensors.keys():
        raise CorruptArtifact(f"tensors {prefix}* hold neither frequencies nor tables")
    for name, rows in (("inv_freq", None), ("cos", tokens), ("sin", tokens)):
        found = tensors.get(name)
        wanted = (count,) if rows is None else (rows, count)
        if found is not None and (tuple(found.shape) != wanted or not found.dtype.is_floating_point):
            raise CorruptArtifact(
                f"tensor {prefix}{name} is {found.dtype} {list(found.shape)}, not {list(wanted)}"
            )
    try:
        return RotaryTable.from_tensors(tensors)
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise CorruptArtifact(f"tensors {prefix}* are not a rotary table: {error}") from None
