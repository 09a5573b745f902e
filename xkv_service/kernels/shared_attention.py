"""Attention of many sessions over documents whose keys and values are there (reference:
`shared_attention_plainly` in `decode_plainly.py`).

Sessions on one document stand in one product: a program reads a tile of keys and values once for all of them
(a cascade). The tokens are split over programs, whose parts are merged by their logarithms, together with
what was attended to besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.addresses import addresses, table, upload
from xkv_service.kernels.factor_rows import KERNEL_TYPES
from xkv_service.kernels.product import product

_ROWS = (16, 64, 128)
"""Of a product, which the query heads of a group's sessions fill: more do not fit into shared memory."""
_PROGRAMS = 264
"""That a launch shall have, two for each multiprocessor of an H100: tokens are split accordingly."""
_MOST_SPLITS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    queries, keys, values, first, end, peak, total, result, scaling, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Softmax over the tokens from `first` on, those from `end` on left out."""
    place = first + tl.arange(0, TILE).to(tl.int64)
    dim, value_dim = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    key_at = tl.multiple_of(keys + place[None, :] * DIM + dim[:, None], [16, 16])
    value_at = tl.multiple_of(values + place[:, None] * VALUE_DIM + value_dim[None, :], [16, 16])
    if MASKED:
        inside = place < end
        key = tl.load(key_at, mask=inside[None, :], other=0.0)
        value = tl.load(value_at, mask=inside[:, None], other=0.0)
    else:
        key, value = tl.load(key_at), tl.load(value_at)
    score = product(queries, key, tl.full((ROWS, TILE), 0, tl.float32), PRECISION) * scaling
    if MASKED:
        score = tl.where(inside[None, :], score, -float("inf"))
    higher = tl.maximum(peak, tl.max(score, axis=1))
    weight = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weight, axis=1)
    return higher, total, product(weight.to(DTYPE), value, result * shrink[:, None], PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _shared(  # type: ignore[no-untyped-def]
    query, places, sizes, members, parts, logs, scaling, width, HEADS: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(sizes + group)
    if length == 0:
        return
    row = tl.arange(0, ROWS)
    used = row < SIZE * GROUP
    member = tl.load(members + group * SIZE + row // GROUP, mask=used, other=-1).to(tl.int64)
    there = member >= 0
    line = (member * HEADS + head) * GROUP + row % GROUP
    dim, value_dim = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    queries = tl.load(query + line[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0).to(DTYPE)
    room = head.to(tl.int64) * tl.load(sizes + width + group)
    keys = tl.load(places + group).to(tl.pointer_type(DTYPE)) + room * DIM
    values = tl.load(places + width + group).to(tl.pointer_type(DTYPE)) + room * VALUE_DIM
    each = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = tl.minimum(split * each, length)
    end = tl.minimum(begin + each, length)
    whole = begin + (end - begin) // TILE * TILE
    peak = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.full((ROWS,), 0, tl.float32)
    result = tl.full((ROWS, VALUE_DIM), 0, tl.float32)
    for first in range(begin, whole, TILE):
        peak, total, result = _tile(
            queries, keys, values, first, end, peak, total, result, scaling, DIM, VALUE_DIM, ROWS, TILE,
            DTYPE, PRECISION, False,
        )  # fmt: skip
    if whole < end:
        peak, total, result = _tile(
            queries, keys, values, whole, end, peak, total, result, scaling, DIM, VALUE_DIM, ROWS, TILE,
            DTYPE, PRECISION, True,
        )  # fmt: skip
    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = ((group * SPLITS + split) * HEADS + head) * ROWS + row
    tl.store(parts + place[:, None] * VALUE_DIM + value_dim[None, :], result / safe[:, None])
    tl.store(logs + place, tl.where(some, peak + tl.log2(safe), -3.0e38))


@triton.jit  # type: ignore[untyped-decorator]
def _merged(  # type: ignore[no-untyped-def]
    sizes, members, parts, logs, rest, rest_log, HEADS: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One query head of one session: its parts and what is in `rest` already become `rest`."""
    number, query_head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    session = tl.load(members + group * SIZE + number).to(tl.int64)
    if (tl.load(sizes + group) == 0) | (session < 0):
        return
    to_base_2: tl.constexpr = 1.4426950408889634
    line = session * (HEADS * GROUP) + query_head
    split, dim = tl.arange(0, WIDE), tl.arange(0, VALUE_DIM)
    row = number * GROUP + query_head % GROUP
    place = ((group * SPLITS + split) * HEADS + query_head // GROUP) * ROWS + row
    log = tl.load(logs + place, mask=split < SPLITS, other=-3.0e38)
    before = tl.load(rest_log + line) * to_base_2
    highest = tl.maximum(tl.max(log), before)
    weight = tl.exp2(log - highest)
    own = tl.exp2(before - highest)
    total = tl.sum(weight) + own
    part_at = parts + place[:, None] * VALUE_DIM + dim[None, :]
    part = tl.load(part_at, mask=(split < SPLITS)[:, None], other=0.0)
    found = tl.sum(part * weight[:, None], axis=0) + own * tl.load(rest + line * VALUE_DIM + dim)
    tl.store(rest + line * VALUE_DIM + dim, found / total)
    tl.store(rest_log + line, (highest + tl.log2(total)) / to_base_2)


@dataclass(frozen=True)
class Shape:
    """What a launch is compiled for, and its buffers are for.

    Args:
        groups: most groups. size: most sessions of a group.
    """

    groups: int
    size: int

    @classmethod
    def of(cls, counts: Sequence[int], group: int) -> Shape:
        """For documents of so many sessions each, of `group` query heads for each head of keys."""
        sizes = [max(1, rows // group) for rows in _ROWS]
        size = next((one for one in sizes if max(counts) <= one), sizes[-1])
        groups = sum(-(-count // size) for count in counts)
        return cls(1 << (groups - 1).bit_length(), size)


class SharedGroups:
    """Which sessions share a document, for all layers; tables on the device, which a CUDA graph reads anew.

    Attributes:
        members: int32 [groups, size], sessions; -1: none. sizes: int32 [2, width], tokens that a group
            attends to, 0 of one that is not there, and tokens from one head to the next.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self._device = shape, device
        self.members = torch.full((shape.groups, shape.size), -1, dtype=torch.int32, device=device)
        self.width = -(-shape.groups // 4) * 4
        self.sizes = torch.zeros(2, self.width, dtype=torch.int32, device=device)
        self.places: dict[int, torch.Tensor] = {}
        self._documents: list[dict[int, States]] = []

    def overwrite(self, documents: Sequence[tuple[dict[int, States], int, Sequence[int]]]) -> None:
        """Attend for other sessions from now on.

        Args:
            documents: by layer index their keys and values, tokens to attend to, and the sessions.

        Raises:
            ValueError: more groups than there is room for, or strided tensors.
        """
        size = self.shape.size
        groups = [
            (states, tokens, list(sessions[first : first + size]))
            for states, tokens, sessions in documents
            for first in range(0, len(sessions), size)
        ]
        if len(groups) > self.shape.groups:
            raise ValueError(f"{len(groups)} groups of {size} sessions, and room for {self.shape.groups}")
        none = self.shape.groups - len(groups)
        members = [sessions + [-1] * (size - len(sessions)) for _, _, sessions in groups]
        self.members.copy_(torch.tensor(members + [[-1] * size] * none, dtype=torch.int32), non_blocking=True)
        rooms = [next(iter(states.values())).keys.shape[1] for states, _, _ in groups]
        sizes = [[tokens, room] for (_, tokens, _), room in zip(groups, rooms, strict=True)]
        self.sizes.copy_(table(sizes + [[0, 0]] * none, torch.int32), non_blocking=True)
        for layer in groups[0][0]:
            found = table([_place(states[layer]) for states, _, _ in groups] + [[0, 0]] * none, torch.int64)
            if layer in self.places:
                self.places[layer].copy_(found, non_blocking=True)
            else:
                self.places[layer] = upload(found, self._device)
        self._documents = [states for states, _, _ in groups]  # alive as long as their addresses

    def forget(self) -> None:
        """Keep no document alive any more: it must not be read before it is overwritten."""
        self._documents = []


class SharedAttention:
    """One layer's attention over shared documents; memory is taken once for all layers of one shape.

    Args:
        shape: of the groups. heads: of keys and values. group: query heads of each. dim, value_dim: of heads.
        dtype: of keys, values and products.

    Raises:
        ValueError: heads that no power of 2 describes.
    """

    def __init__(
        self, shape: Shape, heads: int, group: int, dim: int, value_dim: int, dtype: torch.dtype,
        device: torch.device, *, tile: int = 64, warps: int = 8, stages: int = 3,
    ) -> None:  # fmt: skip
        if any(size < 16 or size & (size - 1) for size in (dim, value_dim)):
            raise ValueError(f"heads of {dim} and {value_dim} dimensions: kernels take powers of 2 from 16")
        self.shape, self._heads, self._group, self._dim, self._value_dim = shape, heads, group, dim, value_dim
        self._dtype, self._rows = dtype, max(16, triton.next_power_of_2(shape.size * group))
        wanted = -(-_PROGRAMS // (shape.groups * heads))
        self._splits = max(1, min(_MOST_SPLITS, wanted))
        self._options = {"TILE": tile, "num_warps": warps, "num_stages": stages}
        places = shape.groups, self._splits, heads, self._rows
        self._parts = torch.empty(*places, value_dim, device=device)
        self._logs = torch.empty(*places, device=device)

    def __call__(
        self, query: torch.Tensor, groups: SharedGroups, layer: int, rest: torch.Tensor,
        rest_log: torch.Tensor, scaling: float,
    ) -> None:  # fmt: skip
        """Add attention over the documents to what a session has attended to; others keep what they have.

        Args:
            query: [sessions, query_heads, D], rotated, contiguous. layer: whose keys and values.
            rest: float32 [sessions, query_heads, Dv], attention so far. rest_log: float32 [sessions,
                query_heads], the log of the sum of exponentials of its scores.
        """
        shape, common = self.shape, {"HEADS": self._heads, "GROUP": self._group, "SIZE": self.shape.size}
        common |= {"VALUE_DIM": self._value_dim, "ROWS": self._rows, "SPLITS": self._splits}
        _shared[self._splits, self._heads, shape.groups](
            query, groups.places[layer], groups.sizes, groups.members, self._parts, self._logs,
            scaling * 1.4426950408889634, groups.width, **common, DIM=self._dim,
            DTYPE=KERNEL_TYPES[self._dtype],
            PRECISION="ieee" if self._dtype == torch.float32 else "tf32", **self._options,
        )  # fmt: skip
        _merged[shape.size, self._heads * self._group, shape.groups](
            groups.sizes, groups.members, self._parts, self._logs, rest, rest_log, **common,
            WIDE=triton.next_power_of_2(self._splits), num_warps=4,
        )  # fmt: skip


def _place(states: States) -> list[int]:
    if not (states.keys.is_contiguous() and states.values.is_contiguous()):
        raise ValueError("kernels read contiguous keys and values")
    return addresses([states.keys, states.values])
