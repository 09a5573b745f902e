"""Attention of many sessions over documents whose keys and values are there (reference:
`shared_attention_plainly` in `decode_plainly.py`).

Sessions on one document stand in one product: a program reads a tile of keys and values once for all of them
(a cascade). The tokens are split over programs, whose parts are merged by their logarithms, together with
what was attended to besides. Of more sessions than a product takes, each group reads the document again:
there cuDNN, where it runs, reads most of a long one once (`cudnn_attention.py`), and the kernel the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.addresses import addresses, table, upload
from xkv_service.kernels.cudnn_attention import attend_by_parts, cudnn_parts, cudnn_tokens
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
    row = tl.arange(0, ROWS)
    place = ((group * SPLITS + split) * HEADS + head) * ROWS + row
    if length == 0:
        tl.store(logs + place, tl.full((ROWS,), -3.0e38, tl.float32))
        return
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
    tl.store(parts + place[:, None] * VALUE_DIM + value_dim[None, :], result / safe[:, None])
    tl.store(logs + place, tl.where(some, peak + tl.log2(safe), -3.0e38))


@triton.jit  # type: ignore[untyped-decorator]
def _merged(  # type: ignore[no-untyped-def]
    members, parts, logs, rest, rest_log, size, rows, HEADS: tl.constexpr, GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """One query head of one session: its parts and what is in `rest` already become `rest`.

    Logs of parts are natural ones or of base 2; -3e38: there is no part.
    """
    number, query_head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    session = tl.load(members + group * size + number).to(tl.int64)
    if session < 0:
        return
    to_base_2: tl.constexpr = 1.4426950408889634
    line = session * (HEADS * GROUP) + query_head
    split, dim = tl.arange(0, WIDE), tl.arange(0, VALUE_DIM)
    row = number * GROUP + query_head % GROUP
    place = ((group * SPLITS + split) * HEADS + query_head // GROUP) * rows + row
    log = tl.load(logs + place, mask=split < SPLITS, other=-3.0e38)
    there = log > -1.0e38
    if NATURAL:
        log = tl.where(there, log * to_base_2, log)
    before = tl.load(rest_log + line) * to_base_2
    highest = tl.maximum(tl.max(log), before)
    weight = tl.exp2(log - highest)
    own = tl.exp2(before - highest)
    total = tl.sum(weight) + own
    part_at = parts + place[:, None] * VALUE_DIM + dim[None, :]
    part = tl.load(part_at, mask=there[:, None], other=0.0).to(tl.float32)
    found = tl.sum(part * weight[:, None], axis=0) + own * tl.load(rest + line * VALUE_DIM + dim)
    tl.store(rest + line * VALUE_DIM + dim, found / total)
    tl.store(rest_log + line, (highest + tl.log2(total)) / to_base_2)


@dataclass(frozen=True)
class Document:
    """Keys and values that some sessions attend to.

    Args:
        number: no other keys and values have it. layers: by layer index. tokens: the first so many.
    """

    number: int
    layers: dict[int, States]
    tokens: int

    def by_cudnn(self, rows: int) -> tuple[int, int]:
        """How many of the tokens cuDNN reads for rows of each head of keys, and in how many parts."""
        parts = cudnn_parts(max(len(states.keys) for states in self.layers.values()), rows)
        return min(cudnn_tokens(states, self.tokens, parts) for states in self.layers.values()), parts


@dataclass(frozen=True)
class Fixed:
    """What cuDNN reads of one document, and for whom: a CUDA graph is of these addresses.

    Args:
        document: its number. tokens: all that sessions attend to. by_cudnn: of them, the first ones, in
            parts. first, groups: its groups of sessions.
    """

    document: int
    tokens: int
    by_cudnn: int
    parts: int
    first: int
    groups: int


@dataclass(frozen=True)
class Shape:
    """What a launch is compiled for, and its buffers are for.

    Args:
        groups: most groups. size: most sessions of a group. fixed: documents of which cuDNN reads most.
        kernel: whether there may be tokens that it does not read.
    """

    groups: int
    size: int
    fixed: tuple[Fixed, ...] = ()
    kernel: bool = True

    @classmethod
    def of(
        cls, documents: Sequence[tuple[Document, int]], group: int, *, any_document: bool = False
    ) -> Shape:
        """For documents of so many sessions each, of `group` query heads for each head of keys.

        Args:
            any_document: nothing is fixed, so that a graph is of other documents too.
        """
        sizes, counts = [max(1, rows // group) for rows in _ROWS], [count for _, count in documents]
        size = next((one for one in sizes if max(counts) <= one), sizes[-1])
        fixed, first, kernel = list[Fixed](), 0, False
        for document, count in documents:
            groups = -(-count // size)
            alone = any_document or groups == 1
            by_cudnn, parts = (0, 0) if alone else document.by_cudnn(groups * size * group)
            if by_cudnn:
                fixed.append(Fixed(document.number, document.tokens, by_cudnn, parts, first, groups))
            first, kernel = first + groups, kernel or by_cudnn < document.tokens
        return cls(1 << (first - 1).bit_length(), size, tuple(fixed), kernel)


class SharedGroups:
    """Which sessions share a document, for all layers; tables on the device, which a CUDA graph reads anew.

    Attributes:
        members: int32 [groups, size], sessions; -1: none. sources: the same, 0 for none. sizes: int32
            [2, width], tokens that the kernel reads for a group, 0 of one that is not there, and tokens from
            one head to the next.
        documents: of each group. Alive as long as their addresses.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self._device = shape, device
        self.members = torch.full((shape.groups, shape.size), -1, dtype=torch.int32, device=device)
        self.sources = torch.zeros_like(self.members)
        self.width = -(-shape.groups // 4) * 4
        self.sizes = torch.zeros(2, self.width, dtype=torch.int32, device=device)
        self.places: dict[int, torch.Tensor] = {}
        self.documents: list[Document] = []

    def overwrite(self, documents: Sequence[tuple[Document, Sequence[int]]]) -> None:
        """Attend for other sessions from now on.

        Args:
            documents: and their sessions. Those that cuDNN reads are those of the shape, in its order.

        Raises:
            ValueError: more groups than there is room for, other documents, or strided tensors.
        """
        size = self.shape.size
        groups = [
            (document, list(sessions[first : first + size]))
            for document, sessions in documents
            for first in range(0, len(sessions), size)
        ]
        if len(groups) > self.shape.groups:
            raise ValueError(f"{len(groups)} groups of {size} sessions, and room for {self.shape.groups}")
        self.documents = [document for document, _ in groups]
        done = self._read_by_cudnn()
        none = self.shape.groups - len(groups)
        members = [sessions + [-1] * (size - len(sessions)) for _, sessions in groups] + [[-1] * size] * none
        self._put(self.members, torch.tensor(members, dtype=torch.int32))
        self._put(self.sources, torch.tensor(members, dtype=torch.int32).clamp_min(0))
        rooms = [next(iter(one.layers.values())).keys.shape[1] for one in self.documents]
        sizes = [[self.documents[at].tokens - done[at], room] for at, room in enumerate(rooms)]
        self._put(self.sizes, table(sizes + [[0, 0]] * none, torch.int32))
        for layer in self.documents[0].layers:
            places = [_place(one.layers[layer], done[at]) for at, one in enumerate(self.documents)]
            found = table(places + [[0, 0]] * none, torch.int64)
            if layer in self.places:
                self._put(self.places[layer], found)
            else:
                self.places[layer] = upload(found, self._device)

    def forget(self) -> None:
        """Keep no document alive any more: it must not be read before it is overwritten."""
        self.documents = []

    def _read_by_cudnn(self) -> list[int]:
        """Of each group, the document's first tokens, which the kernel leaves to cuDNN."""
        done = [0] * self.shape.groups
        for one in self.shape.fixed:
            if self.documents[one.first].number != one.document:
                raise ValueError("other documents than those that a graph may have been captured for")
            done[one.first : one.first + one.groups] = [one.by_cudnn] * one.groups
        return done

    @staticmethod
    def _put(on_device: torch.Tensor, values: torch.Tensor) -> None:
        on_device.copy_(values, non_blocking=True)


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
        places = shape.groups if shape.kernel else 0, self._splits, heads, self._rows
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
        for fixed in self.shape.fixed:
            self._by_cudnn(query, groups, fixed, layer, rest, rest_log, scaling)
        if not self.shape.kernel:
            return
        shape, common = self.shape, {"HEADS": self._heads, "GROUP": self._group}
        common |= {"VALUE_DIM": self._value_dim, "SPLITS": self._splits}
        _shared[self._splits, self._heads, shape.groups](
            query, groups.places[layer], groups.sizes, groups.members, self._parts, self._logs,
            scaling * 1.4426950408889634, groups.width, **common, SIZE=shape.size, DIM=self._dim,
            ROWS=self._rows, DTYPE=KERNEL_TYPES[self._dtype],
            PRECISION="ieee" if self._dtype == torch.float32 else "tf32", **self._options,
        )  # fmt: skip
        _merged[shape.size, self._heads * self._group, shape.groups](
            groups.members, self._parts, self._logs, rest, rest_log, shape.size, self._rows, **common,
            WIDE=triton.next_power_of_2(self._splits), NATURAL=False, num_warps=4,
        )  # fmt: skip

    def _by_cudnn(
        self, query: torch.Tensor, groups: SharedGroups, fixed: Fixed, layer: int, rest: torch.Tensor,
        rest_log: torch.Tensor, scaling: float,
    ) -> None:  # fmt: skip
        """Add attention to what cuDNN reads of one document."""
        own = slice(fixed.first, fixed.first + fixed.groups)
        states = groups.documents[fixed.first].layers[layer]
        asked = query.index_select(0, groups.sources[own].view(-1)).to(self._dtype)
        count = len(asked)
        rows = asked.view(count, self._heads, self._group, self._dim).transpose(0, 1)
        found, logs = attend_by_parts(
            rows.reshape(self._heads, -1, self._dim), states.keys[:, : fixed.by_cudnn],
            states.values[:, : fixed.by_cudnn], scaling, fixed.parts,
        )  # fmt: skip
        _merged[count, self._heads * self._group, 1](
            groups.members[own], found, logs, rest, rest_log, count, count * self._group, HEADS=self._heads,
            GROUP=self._group, VALUE_DIM=self._value_dim, SPLITS=fixed.parts, WIDE=fixed.parts, NATURAL=True,
            num_warps=4,
        )  # fmt: skip


def _place(states: States, first: int) -> list[int]:
    """Addresses of a document's keys and values from token `first` on."""
    if not (states.keys.is_contiguous() and states.values.is_contiguous()):
        raise ValueError("kernels read contiguous keys and values")
    return addresses([states.keys[:, first:], states.values[:, first:]])
