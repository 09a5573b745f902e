"""Byte accounting, and the largest ranks whose artifact reaches a target ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xkv_artifacts.manifest import GroupLayout, StateLayout, WindowLayout
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.plan import ColumnPlan
from xkv_service.errors import InvalidSpec, PrefixTooShort, RatioUnreachable
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.packed_factors import Runs, rank_of
from xkv_service.selection.reuse import followers, refuse_reuse
from xkv_service.spec import CompressionSpec, Rank
from xkv_service.stored import StoredTensor, stored_tensors

HEADER_BYTES = 4096
HEADER_BYTES_PER_TENSOR = 280
ALIGNED_FROM = 128
_SEARCH = 24


@dataclass(frozen=True)
class Size:
    """What an artifact takes, known before anything is computed.

    Args:
        bytes_full: the exact cache in the model's dtype.
        bytes_tensors: every stored tensor.
        bytes_stored: the file at most: tensors and an allowance for the header.
        groups, windows, states: resolved ranks and shapes.
    """

    bytes_full: int
    bytes_tensors: int
    bytes_stored: int
    groups: tuple[GroupLayout, ...]
    windows: tuple[WindowLayout, ...]
    states: tuple[StateLayout, ...] = ()

    @property
    def ratio(self) -> float:
        """bytes_full / bytes_stored."""
        return self.bytes_full / self.bytes_stored


@dataclass(frozen=True)
class RotaryUse:
    """Which rotary table each layer uses, and the bytes and tensors of all tables."""

    table_of: Mapping[int, int]
    nbytes: int
    tensors: int


def size_of(
    layout: ModelLayout,
    tokens: int,
    spec: CompressionSpec,
    rotary: RotaryUse | None = None,
    calibration: Calibration | None = None,
) -> Size:
    """Ranks and bytes of an artifact.

    Args:
        layout: the model's cache. tokens: T, tokens of the prefix. spec: what to store.
        rotary: the model's rotary tables; None assumes one table by formula per head dimension.
        calibration: the one that the spec names, if it names one.

    Raises:
        RatioUnreachable: the target ratio leaves no byte for factors.
        InvalidSpec: a rank larger than the matrix it is a rank of, another calibration than the spec's, or a
            layer that cannot reuse another's choice.
    """
    refuse_reuse(spec.reuse, followers(layout.compressible))
    rotary = rotary or _assumed_rotary(layout)
    windows = _windows(layout, tokens)
    named = _named(spec, calibration)
    if named is not None:
        return _calibrated(layout, tokens, spec, rotary, windows, named)
    _refuse_large_ranks(layout, tokens, spec)

    def sized(density: int) -> Size:
        groups = tuple(
            _group(layers, rotary, *ranks(spec, tokens, layers, density))
            for layers in layout.groups(spec.group_size)
        )
        return _size(layout, tokens, spec, groups, windows, rotary)

    if spec.ratio is None:
        return sized(0)
    budget = int(layout.bytes_full(tokens) / spec.ratio)
    most = 2 * spec.group_size * max(layer.key_width + layer.value_width for layer in layout.compressible)
    density = _largest(lambda density: sized(density).bytes_stored <= budget, most)
    if density is None:
        raise _unreachable(spec, tokens, sized(0))
    return sized(density)


def most_ratio(layout: ModelLayout, tokens: int, group_size: int) -> float:
    """A ratio that no calibration in groups of up to `group_size` layers passes.

    It stands for shared bases, a column of two bits for each group's keys and values, and no rotary tables.
    """
    spec = CompressionSpec(ratio=1.0, calibration="0" * 64, factor_dtype="mixed", index="derived").over(
        "calibrated"
    )
    free = RotaryUse(_assumed_rotary(layout).table_of, 0, 0)
    least = (((2, 1),), ((2, 1),))
    groups = tuple(
        _group(layers, free, 1, 1, *least)
        if layers[0].kind == "full"
        else _group(layers, free, 1, 0, least[0])
        for layers in layout.groups(group_size)
    )
    return _size(layout, tokens, spec, groups, _windows(layout, tokens), free).ratio


def _named(spec: CompressionSpec, calibration: Calibration | None) -> Calibration | None:
    """The calibration, checked to be the one that the spec names, if it names one."""
    given = None if calibration is None else calibration.id
    if given != spec.calibration:
        raise InvalidSpec(
            f"the spec names calibration {str(spec.calibration)[:12]}, {str(given)[:12]} was given",
            hint="pass the calibration that the spec names",
        )
    return calibration


def _calibrated(
    layout: ModelLayout,
    tokens: int,
    spec: CompressionSpec,
    rotary: RotaryUse,
    windows: tuple[WindowLayout, ...],
    calibration: Calibration,
) -> Size:
    """The most bits that fit: all that is not token factors is known, but for the number of tensors."""
    grouped, plan = calibration.layer_groups(layout), ColumnPlan(calibration, spec, tokens)

    def sized(bits_per_token: float) -> Size:
        groups = tuple(
            _group(layers, rotary, rank_of(keys), rank_of(values), keys, values)
            for layers, (keys, values) in zip(grouped, plan.runs(bits_per_token), strict=True)
        )
        return _size(layout, tokens, spec, groups, windows, rotary)

    assert spec.ratio is not None
    budget = int(layout.bytes_full(tokens) / spec.ratio)
    most = 8 * layout.bytes_full(tokens) / tokens
    least = sized(0.0)
    if least.bytes_stored > budget:
        raise _unreachable(spec, tokens, least)
    return _most_bits(sized, budget, least, most)


def _most_bits(sized: Callable[[float], Size], budget: int, least: Size, most: float) -> Size:
    """The size of the most bits a token, up to `most`, that fit; `least` is that of none."""
    best, low, high = least, 0.0, most
    for _ in range(_SEARCH):
        middle = (low + high) / 2
        found = sized(middle)
        if found.bytes_stored <= budget:
            best, low = found, middle
        else:
            high = middle
    return best


def ranks(
    spec: CompressionSpec, tokens: int, layers: tuple[LayerLayout, ...], density: int
) -> tuple[int, int]:
    """(rank_k, rank_v) of a group: the spec's own ranks, or its share of `density` ranks per full group.

    A group of fewer layers gets as many fewer ranks. What one side cannot use goes to the other. Latents
    (MLA) get all, since they have no other side: rank_v is 0.
    """
    most_k = min(tokens, sum(layer.key_width for layer in layers))
    if layers[0].kind == "latent":
        wanted = max(1, density * len(layers) // spec.group_size)
        return (
            _aligned(min(most_k, wanted), most_k) if spec.rank_k is None else _capped(spec.rank_k, most_k)
        ), 0
    most_v = min(tokens, sum(layer.value_width for layer in layers))
    if spec.rank_k is not None and spec.rank_v is not None:
        return _capped(spec.rank_k, most_k), _capped(spec.rank_v, most_v)
    total = max(2, density * len(layers) // spec.group_size)
    rank_k = min(most_k, max(1, round(total * spec.key_share)))
    rank_v = min(most_v, max(1, total - rank_k))
    rank_k = min(most_k, max(rank_k, total - rank_v))
    return _aligned(rank_k, most_k), _aligned(rank_v, most_v)


def _aligned(rank: int, most: int) -> int:
    """A large rank rounded down to a multiple of 8: tensor cores read rows of 16 aligned bytes.

    Ranks the user names are left alone. Below `ALIGNED_FROM` the ranks lost would weigh more than the time.
    """
    return rank if rank < ALIGNED_FROM or rank == most else rank - rank % 8


def _capped(rank: Rank, most: int) -> int:
    return most if isinstance(rank, str) else min(rank, most)


def _refuse_large_ranks(layout: ModelLayout, tokens: int, spec: CompressionSpec) -> None:
    """A rank must fit the widest group; the last group may have fewer layers, and then keeps all it has."""
    groups = layout.groups(spec.group_size)
    widest_k = max(sum(layer.key_width for layer in layers) for layers in groups)
    with_values = [layers for layers in groups if layers[0].kind == "full"]
    widest_v = max((sum(layer.value_width for layer in layers) for layers in with_values), default=None)
    for name, rank, width in (("rank_k", spec.rank_k, widest_k), ("rank_v", spec.rank_v, widest_v)):
        if width is None:
            continue
        most = min(tokens, width)
        if isinstance(rank, int) and rank > most:
            raise InvalidSpec(
                f"{name}={rank} is larger than its matrix allows: {tokens} tokens x {width} features",
                hint=f'use {most} or less, or "full"',
            )


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 0 to `most` that fits, if 0 does; `fits` is monotone."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _unreachable(spec: CompressionSpec, tokens: int, least: Size) -> RatioUnreachable:
    if least.ratio < 1:
        return PrefixTooShort(
            f"{tokens} tokens are too few for any ratio: compressed as far as they can be, they take "
            f"{1 / least.ratio:.1f} times the bytes of their exact cache",
            hint="give a longer text, or join short documents",
        )
    return RatioUnreachable(
        f"ratio={spec.ratio:g} cannot be reached for {tokens} tokens: with its index and what stays exact "
        f"it is {least.ratio:.2f}x at most",
        hint="lower the ratio, or give a longer text: one this short has too few bytes to save",
    )


def _group(
    layers: tuple[LayerLayout, ...],
    rotary: RotaryUse,
    rank_k: int,
    rank_v: int,
    columns_k: Runs = (),
    columns_v: Runs = (),
) -> GroupLayout:
    latent = layers[0].kind == "latent"
    return GroupLayout(
        layers=tuple(layer.index for layer in layers),
        kv_heads=tuple(layer.kv_heads for layer in layers),
        key_widths=tuple(layer.key_width for layer in layers),
        value_widths=tuple(0 if latent else layer.value_width for layer in layers),
        rotary=tuple(rotary.table_of[layer.index] for layer in layers),
        rank_k=rank_k,
        rank_v=rank_v,
        rope_widths=tuple(layer.value_width for layer in layers if latent),
        columns_k=columns_k,  # type: ignore[arg-type] # bits are 2, 4 or 8
        columns_v=columns_v,  # type: ignore[arg-type]
    )


def _windows(layout: ModelLayout, tokens: int) -> tuple[WindowLayout, ...]:
    return tuple(
        WindowLayout(
            layer=layer.index,
            tokens=min(tokens, layer.window),
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
        )
        for layer in layout.layers
        if layer.window is not None
    )


def _size(
    layout: ModelLayout,
    tokens: int,
    spec: CompressionSpec,
    groups: tuple[GroupLayout, ...],
    windows: tuple[WindowLayout, ...],
    rotary: RotaryUse,
) -> Size:
    table = stored_tensors(spec, tokens, groups, windows, layout.states)
    tensors = sum(map(_nbytes, table.values())) + rotary.nbytes
    header = HEADER_BYTES + HEADER_BYTES_PER_TENSOR * (len(table) + rotary.tensors)
    return Size(layout.bytes_full(tokens), tensors, tensors + header, groups, windows, layout.states)


def _nbytes(tensor: StoredTensor) -> int:
    return tensor.nbytes


def _assumed_rotary(layout: ModelLayout) -> RotaryUse:
    """One table per head dimension: planes int32 [D / 2, 2], inv_freq float32 [D / 2], scaling, rounding.

    Latents do not turn: their planes, cos and sin are empty.
    """
    turned = {layer.index: 0 if layer.kind == "latent" else layer.head_dim for layer in layout.compressible}
    dims = sorted(set(turned.values()))
    table_of = {index: dims.index(dim) for index, dim in turned.items()}
    return RotaryUse(table_of, sum(6 * dim + 12 for dim in dims), sum(4 if dim else 5 for dim in dims))
