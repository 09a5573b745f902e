"""Prefix factors as named tensors and back, each name, shape and dtype checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import GroupLayout, PrefixManifest, StateLayout
from xkv_service.calibration.calibration import Calibration, Kind, SharedBasis
from xkv_service.errors import InvalidSpec
from xkv_service.factors import GroupFactors, LayerWindow, LowRank, PrefixFactors
from xkv_service.manifest_checks import checked_spec
from xkv_service.modeling.linear_state import LayerState
from xkv_service.modeling.rotary import RotaryTable
from xkv_service.packed_factors import PackedFactors, Runs, column_blocks, packed_width
from xkv_service.selection.exact import ExactTokens
from xkv_service.selection.sketch import KeySketch
from xkv_service.spec import CompressionSpec
from xkv_service.stored import RANK_BLOCK, StoredTensor, group_tensors, runs_of, stored_tensors

Tensors = Mapping[str, torch.Tensor]


def to_tensors(factors: PrefixFactors) -> dict[str, torch.Tensor]:
    """Every tensor under its stored name, on the CPU and contiguous."""
    tensors: dict[str, torch.Tensor] = {"tokens": factors.token_ids}
    for number, group in enumerate(factors.groups):
        layout = group.layout
        runs = runs_of(factors.spec, layout.rank_k, layout.columns_k)
        tensors.update(_blocks(f"group.{number}.key", group.keys, runs))
        if group.values is not None:
            runs = runs_of(factors.spec, layout.rank_v, layout.columns_v)
            tensors.update(_blocks(f"group.{number}.value", group.values, runs))
    for layer, planes in factors.planes.items():
        tensors[f"layer.{layer}.sketch.planes"] = planes
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


def from_tensors(
    manifest: PrefixManifest, tensors: Tensors, calibration: Calibration | None = None
) -> PrefixFactors:
    """Factors from a file's tensors.

    Args:
        calibration: whose bases the artifact shares, where it has none of its own.

    Raises:
        CorruptArtifact: names the first tensor that is not what the manifest says.
        InvalidSpec: the artifact needs another calibration.
    """
    spec = checked_spec(manifest, max(len(tensors), len(manifest.tensors)))
    shared = _needed(spec, calibration)
    table = stored_tensors(spec, manifest.tokens, manifest.groups, manifest.windows, manifest.states)
    _check(table, tensors)
    return _with_groups(_head(spec, manifest, tensors), manifest, tensors, shared, manifest.groups)


def head_from_tensors(
    manifest: PrefixManifest, tensors: Tensors, calibration: Calibration | None = None
) -> PrefixFactors:
    """Factors without groups, from the tensors that belong to none. As `from_tensors`."""
    spec = checked_spec(manifest, max(len(tensors), len(manifest.tensors)))
    _needed(spec, calibration)
    _check(stored_tensors(spec, manifest.tokens, (), manifest.windows, manifest.states), tensors)
    return _head(spec, manifest, tensors)


def group_from_tensors(
    head: PrefixFactors,
    manifest: PrefixManifest,
    number: int,
    tensors: Tensors,
    calibration: Calibration | None = None,
) -> PrefixFactors:
    """Factors of one group, from its tensors and those of its layers. As `from_tensors`.

    Args:
        head: from the tensors that belong to no group. number: of the group in the manifest.
    """
    group = manifest.groups[number]
    _check(group_tensors(head.spec, manifest.tokens, number, group), tensors, rotary=False)
    return _with_groups(head, manifest, tensors, _needed(head.spec, calibration), (group,), number)


def _head(spec: CompressionSpec, manifest: PrefixManifest, tensors: Tensors) -> PrefixFactors:
    return PrefixFactors(
        spec=spec,
        bytes_full=manifest.bytes_full,
        token_ids=tensors["tokens"],
        groups=(),
        rotary=_rotary(manifest, tensors),
        windows={
            window.layer: LayerWindow(
                tensors[f"layer.{window.layer}.window.keys"], tensors[f"layer.{window.layer}.window.values"]
            )
            for window in manifest.windows
        },
        states={state.layer: _state(state, tensors) for state in manifest.states},
        fidelity=manifest.fidelity,
    )


def _with_groups(
    head: PrefixFactors,
    manifest: PrefixManifest,
    tensors: Tensors,
    shared: Calibration | None,
    groups: Sequence[GroupLayout],
    first: int = 0,
) -> PrefixFactors:
    """The head with groups that follow each other, `first` the number of the first one."""
    spec = head.spec
    layers = [layer for group in groups for layer in group.layers]
    latent = {layer for group in groups if group.latent for layer in group.layers}
    indexed = [layer for layer in layers if layer not in latent and layer not in spec.reuse]
    return replace(
        head,
        groups=tuple(
            _group(number, group, spec, tensors, shared) for number, group in enumerate(groups, first)
        ),
        sketches={layer: _sketch(layer, manifest, tensors) for layer in indexed if spec.index == "sketch"},
        planes={layer: _planes(layer, manifest, tensors) for layer in indexed if spec.index == "derived"},
        landmarks={
            layer: tensors[f"layer.{layer}.landmarks"] for layer in indexed if spec.index == "landmark"
        },
        exact={
            layer: _exact(layer, manifest.tokens, tensors)
            for layer in layers
            if f"layer.{layer}.exact.positions" in tensors
        },
        rope_keys={layer: tensors[f"layer.{layer}.rope_key"] for layer in layers if layer in latent},
    )


def _blocks(name: str, pair: LowRank, runs: Runs) -> dict[str, torch.Tensor]:
    """The blocks of token factors, and bases or the scales of a calibration's."""
    tensors = {}
    for block, ((start, stop, _), columns) in enumerate(
        zip(column_blocks(runs, RANK_BLOCK), _factor_blocks(pair.factors), strict=True)
    ):
        tensors[f"{name}.factors.{block}"] = columns
        if pair.shared is None:
            tensors[f"{name}.bases.{block}"] = pair.directions[start:stop]
    if pair.scales is not None:
        tensors[f"{name}.scales"] = pair.scales
    return tensors


def _factor_blocks(factors: torch.Tensor | PackedFactors) -> Iterator[torch.Tensor]:
    if isinstance(factors, torch.Tensor):
        yield from torch.split(factors, RANK_BLOCK, dim=1)
        return
    for piece, (bits, _) in zip(factors.pieces, factors.runs, strict=True):
        yield from torch.split(piece, packed_width(bits, RANK_BLOCK), dim=1)


def _needed(spec: CompressionSpec, calibration: Calibration | None) -> Calibration | None:
    """The calibration whose bases are used; None where the artifact has its own."""
    if spec.basis == "document":
        return None
    if calibration is None or calibration.id != spec.calibration:
        raise InvalidSpec(
            f"the artifact shares the bases of calibration {str(spec.calibration)[:12]}, which was not given",
            hint="load it with XKVCache.from_artifact, or pass that calibration",
        )
    return calibration


def _check(expected: Mapping[str, StoredTensor], tensors: Tensors, *, rotary: bool = True) -> None:
    for name, wanted in expected.items():
        found = tensors.get(name)
        if found is None:
            raise CorruptArtifact(f"tensor {name} is missing")
        if tuple(found.shape) != wanted.shape or found.dtype != wanted.dtype:
            raise CorruptArtifact(
                f"tensor {name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
    for name in tensors:
        if name not in expected and not (rotary and name.startswith("rotary.")):
            raise CorruptArtifact(f"tensor {name} is not part of the format")


def _group(
    number: int, layout: GroupLayout, spec: CompressionSpec, tensors: Tensors, shared: Calibration | None
) -> GroupFactors:
    def pair(kind: Kind, rank: int, columns: Runs, widths: tuple[int, ...]) -> LowRank:
        name = f"group.{number}.{kind}"
        runs = runs_of(spec, rank, columns)
        factors = _factors(name, runs, tensors, packed=bool(columns))
        if shared is None:
            blocks = range(len(column_blocks(runs, RANK_BLOCK)))
            directions = torch.cat([tensors[f"{name}.bases.{block}"] for block in blocks])
            return LowRank(factors, directions, widths, _scales(name, tensors) if spec.base_dtype else None)
        scales = _scales(name, tensors)
        basis = _shared_basis(shared, layout, kind, len(scales))
        return LowRank(factors, basis.bases[: len(scales)], widths, scales, basis)

    values = None if layout.latent else pair("value", layout.rank_v, layout.columns_v, layout.value_widths)
    keys = pair("key", layout.rank_k, layout.columns_k, layout.key_widths)
    return GroupFactors(layout, keys, values)


def _scales(name: str, tensors: Tensors) -> torch.Tensor:
    scales = tensors[f"{name}.scales"]
    if not bool(torch.isfinite(scales).all()):
        raise CorruptArtifact(f"tensor {name}.scales is not finite")
    return scales


def _factors(name: str, runs: Runs, tensors: Tensors, *, packed: bool) -> torch.Tensor | PackedFactors:
    blocks: dict[int, list[torch.Tensor]] = {}
    for block, (_, _, bits) in enumerate(column_blocks(runs, RANK_BLOCK)):
        blocks.setdefault(bits, []).append(tensors[f"{name}.factors.{block}"])
    pieces = tuple(torch.cat(one, dim=1) for one in blocks.values())
    return PackedFactors(runs, pieces) if packed else pieces[0]


def _shared_basis(calibration: Calibration, layout: GroupLayout, kind: Kind, rank: int) -> SharedBasis:
    try:
        basis = calibration.group_of(layout.layers).basis(kind)
    except KeyError:
        raise CorruptArtifact(f"layers {layout.layers} are no group of the calibration") from None
    widths = layout.key_widths if kind == "key" else layout.value_widths
    if rank > basis.bases.shape[0] or basis.bases.shape[1] != sum(widths):
        raise CorruptArtifact(f"layers {layout.layers}: ranks or widths are not those of the calibration")
    return basis


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


def _planes(layer: int, manifest: PrefixManifest, tensors: Tensors) -> torch.Tensor:
    planes = tensors[f"layer.{layer}.sketch.planes"]
    _check_range(f"layer.{layer}.sketch.planes", planes, _head_dim(layer, manifest))
    return planes


def _sketch(layer: int, manifest: PrefixManifest, tensors: Tensors) -> KeySketch:
    planes = _planes(layer, manifest, tensors)
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
