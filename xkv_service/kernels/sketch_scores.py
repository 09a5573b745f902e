"""Score every token of a prefix by its key sketch (reference: `index_shares_plainly` in `decode_plainly.py`).

The index is read twice, since a head's shares need the sum over all tokens first. Storing the scores of 32
heads instead would take as many bytes as reading the index again. Codes become half precision without
rounding; the picked dimensions of all query heads of a few KV heads stand in one matrix that is zero where a
code belongs to another KV head, so that a product on tensor cores fills its columns though each KV head has
only four queries.

A program scores a few tiles of tokens for one session; sessions on one document find it in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.product import INTERPRETED
from xkv_service.kernels.share_totals import share_totals

_PARTS = 4
"""Four numbers of 4 bits in 16: low and high half of the first and of the second byte."""
_MANY, _FEW, _FEW_TOKENS = (64, 8, 1), (256, 2, 4), 2**17
"""Tokens of a tile, tiles and warps of a program; few tokens need more warps to fill the device."""


@triton.jit  # type: ignore[untyped-decorator]
def _picked_queries(  # type: ignore[no-untyped-def]
    query, planes_at, matrices, gains, offsets, scaling, HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    session, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    planes = tl.load(planes_at + session).to(tl.pointer_type(tl.int16))
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    mine = (row < TOGETHER * PLANES // 2) & (column < TOGETHER * GROUP)
    mine = mine & (row // (PLANES // 2) == column // GROUP)
    source = query + (session * HEADS * GROUP + chunk * TOGETHER * GROUP + column) * DIM
    peak = tl.full((1, COLUMNS), 0, tl.float32)
    for part in tl.static_range(4):
        plane = chunk * TOGETHER * PLANES + 2 * row + part // 2
        known = mine & (plane < HEADS * PLANES)
        dim = tl.load(planes + plane * 2 + part % 2, mask=known, other=0)
        picked = tl.load(source + dim, mask=known, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(picked), axis=0)[None, :])
    unit = tl.where(peak > 0, peak, 1.0)
    total = tl.full((1, COLUMNS), 0, tl.float32)
    for part in tl.static_range(4):
        plane = chunk * TOGETHER * PLANES + 2 * row + part // 2
        known = mine & (plane < HEADS * PLANES)
        dim = tl.load(planes + plane * 2 + part % 2, mask=known, other=0)
        picked = tl.load(source + dim, mask=known, other=0.0).to(tl.float32)
        half = (picked / unit).to(tl.float16)
        total += tl.sum(half.to(tl.float32), axis=0)[None, :]
        if part % 2:  # these codes are read as 16 times what they are
            half = (half.to(tl.float32) / 16).to(tl.float16)
        target = matrices + (((session * CHUNKS + chunk) * 4 + part) * ROWS + row) * COLUMNS + column
        tl.store(target, half)
    gain = unit * (scaling * 1.4426950408889634)
    place = (session * CHUNKS + chunk) * COLUMNS + column
    tl.store(gains + place, gain * 16777216.0)
    tl.store(offsets + place, -8.0 * gain * total)


@triton.jit  # type: ignore[untyped-decorator]
def _codes(pairs, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of the four codes of 16 bits as half precision: the smallest numbers there are, code x 2^-24 (the
    high half of a byte 16 times that), are just these bits. On a GPU two are taken at once.
    """
    if not INTERPRETED:
        if PART == 0:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x000F000F;", "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
            )
        if PART == 1:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x00F000F0;", "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2
            )
        if PART == 2:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 x; shr.u32 x, $1, 8; and.b32 $0, x, 0x000F000F; }", "=r,r", [pairs],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x; shr.u32 x, $1, 8; and.b32 $0, x, 0x00F000F0; }", "=r,r", [pairs],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((pairs >> (PART // 2 * 8)) & (15 << (PART % 2 * 4))).to(tl.float16, bitcast=True)


@triton.jit
def _exp2(bits):  # type: ignore[no-untyped-def]
    """2^bits; on a GPU 0 for results below 2^-126, in one instruction instead of four."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [bits], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(bits)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_scores(  # type: ignore[no-untyped-def]
    codes, scales, tokens, inside, matrices, gains, offsets, session, chunk, HEADS: tl.constexpr,
    GROUP: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Scores in bits [TILE, COLUMNS] of a session's queries of a chunk of KV heads."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pair = chunk * (TOGETHER * PLANES // 2) + row
    source = codes + tokens[:, None] * (HEADS * PLANES // 2) + pair[None, :]
    if (TOGETHER * PLANES // 2 == ROWS) & (HEADS % TOGETHER == 0):
        pairs = tl.load(tl.multiple_of(source, [16, 16]), mask=inside[:, None], other=0)
    else:
        kept = (row < TOGETHER * PLANES // 2) & (pair < HEADS * PLANES // 2)
        pairs = tl.load(source, mask=inside[:, None] & kept[None, :], other=0)
    matrix = (
        matrices + (session * CHUNKS + chunk) * 4 * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    )
    products = tl.dot(_codes(pairs, 0), tl.load(matrix))
    products = tl.dot(_codes(pairs, 1), tl.load(matrix + ROWS * COLUMNS), products)
    products = tl.dot(_codes(pairs, 2), tl.load(matrix + 2 * ROWS * COLUMNS), products)
    products = tl.dot(_codes(pairs, 3), tl.load(matrix + 3 * ROWS * COLUMNS), products)
    place = (session * CHUNKS + chunk) * COLUMNS + column
    if (TOGETHER * GROUP == COLUMNS) & (HEADS % TOGETHER == 0):
        mine = chunk * TOGETHER + tl.arange(0, TOGETHER)
        step = tl.load(scales + tokens[:, None] * HEADS + mine[None, :], mask=inside[:, None], other=0)
        step = tl.reshape(
            tl.broadcast_to(step[:, :, None], (tokens.shape[0], TOGETHER, GROUP)), (tokens.shape[0], COLUMNS)
        )
    else:
        head = chunk * TOGETHER + column // GROUP
        valid = (column < TOGETHER * GROUP) & (head < HEADS)
        step = scales + tokens[:, None] * HEADS + head[None, :]
        step = tl.load(step, mask=inside[:, None] & valid[None, :], other=0)
    products = products * tl.load(gains + place)[None, :] + tl.load(offsets + place)[None, :]
    unseen = tl.where(inside, 0.0, -float("inf"))
    return products * step.to(tl.float32) + unseen[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _own(chunk, HEADS: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Query heads of a chunk's columns; which columns have one."""
    column = tl.arange(0, COLUMNS)
    head = chunk * TOGETHER * GROUP + column
    return head, (column < TOGETHER * GROUP) & (head < HEADS * GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _block_sums(  # type: ignore[no-untyped-def]
    codes_at, scales_at, lengths, matrices, gains, offsets, peaks, sums, blocks, HEADS: tl.constexpr,
    GROUP: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The largest score of each head in a block of tiles, and the sum of the powers of 2 below it."""
    block, chunk, session = (
        tl.program_id(0) // CHUNKS,
        tl.program_id(0) % CHUNKS,
        tl.program_id(1).to(tl.int64),
    )
    length = tl.load(lengths + session)
    if block * TILES * TILE >= length:
        return
    codes = tl.load(codes_at + session).to(tl.pointer_type(tl.uint16))
    scales = tl.load(scales_at + session).to(tl.pointer_type(tl.float16))
    stop = tl.minimum((block + 1) * TILES, (length + TILE - 1) // TILE)
    peak = tl.full((COLUMNS,), -float("inf"), tl.float32)
    total = tl.full((COLUMNS,), 0, tl.float32)
    for tile in range(block * TILES, stop):
        tokens = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        scores = _tile_scores(
            codes, scales, tokens, tokens < length, matrices, gains, offsets, session, chunk, HEADS, GROUP,
            PLANES, TOGETHER, ROWS, COLUMNS, CHUNKS,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        total = total * _exp2(peak - higher) + tl.sum(_exp2(scores - higher[None, :]), axis=0)
        peak = higher
    head, valid = _own(chunk, HEADS, GROUP, TOGETHER, COLUMNS)
    place = (session * blocks + block) * (HEADS * GROUP) + head
    tl.store(peaks + place, peak, mask=valid)
    tl.store(sums + place, total, mask=valid)


@triton.jit  # type: ignore[untyped-decorator]
def _block_shares(  # type: ignore[no-untyped-def]
    codes_at, scales_at, lengths, matrices, gains, offsets, totals, shares, capacity,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The logarithm of the largest share of any head, of a block of tiles."""
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + session)
    if block * TILES * TILE >= length:
        return
    codes = tl.load(codes_at + session).to(tl.pointer_type(tl.uint16))
    scales = tl.load(scales_at + session).to(tl.pointer_type(tl.float16))
    stop = tl.minimum((block + 1) * TILES, (length + TILE - 1) // TILE)
    for tile in range(block * TILES, stop):
        tokens = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        inside = tokens < length
        share = tl.full((TILE,), -float("inf"), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            scores = _tile_scores(
                codes, scales, tokens, inside, matrices, gains, offsets, session, chunk, HEADS, GROUP, PLANES,
                TOGETHER, ROWS, COLUMNS, CHUNKS,
            )  # fmt: skip
            head, valid = _own(chunk, HEADS, GROUP, TOGETHER, COLUMNS)
            total = tl.load(totals + session * (HEADS * GROUP) + head, mask=valid, other=float("inf"))
            share = tl.maximum(share, tl.max(scores - total[None, :], axis=1))
        tl.store(shares + session * capacity + tokens, share * 0.6931471805599453, mask=inside)


class SketchScores:
    """Scores of one batch of sessions, in memory that is taken once.

    Args:
        sessions: of the batch. capacity: most tokens of a document. heads, group, dim: KV heads, query heads
            of each, and their dimensions. planes: kept of each head. scaling: of products.
        tile: tokens that are scored at once. tiles: of a program. together: KV heads of one product.
            Tiles are by default what was fastest for as many tokens of all sessions (docs/kernels.md).

    Attributes:
        shares: float32 [sessions, capacity], the logarithm of the largest share any head would give a token.
        totals: float32 [sessions, query_heads], the log in bits of the sum that each head's shares are of.
    """

    def __init__(
        self, sessions: int, capacity: int, heads: int, group: int, dim: int, planes: int, scaling: float,
        device: torch.device, *, tile: int | None = None, tiles: int | None = None, together: int = 4,
        warps: int | None = None,
    ) -> None:  # fmt: skip
        self.sessions, self.capacity, self.scaling = sessions, capacity, scaling
        if planes % 2:
            raise ValueError(f"planes={planes}: the kernel reads codes in pairs, so they must be even")
        usual = _MANY if tile or sessions * capacity > _FEW_TOKENS else _FEW
        tile, tiles, warps = tile or usual[0], tiles or usual[1], warps or usual[2]
        together = min(together, heads)
        self.rows = heads * group
        self.chunks = triton.cdiv(heads, together)
        self._blocks = triton.cdiv(capacity, tile * tiles)
        self._sizes: dict[str, int] = {"TILE": tile, "TILES": tiles}
        self._launch: dict[str, int] = {"num_warps": warps, "num_stages": 1}
        self._shape: dict[str, Any] = {
            "HEADS": heads, "GROUP": group, "PLANES": planes, "TOGETHER": together,
            "ROWS": max(16, triton.next_power_of_2(together * planes // 2)),
            "COLUMNS": max(16, triton.next_power_of_2(together * group)), "CHUNKS": self.chunks,
        }  # fmt: skip
        self._dim = dim
        new = torch.empty
        size = (sessions, self.chunks, _PARTS, self._shape["ROWS"], self._shape["COLUMNS"])
        self._matrices = new(size, dtype=torch.float16, device=device)
        self._gains = new(sessions, self.chunks, self._shape["COLUMNS"], device=device)
        self._offsets = torch.empty_like(self._gains)
        self._peaks = new(sessions, self._blocks, self.rows, device=device)
        self._sums = torch.empty_like(self._peaks)
        self.totals = new(sessions, self.rows, device=device)
        self.shares = new(sessions, capacity, device=device)

    def __call__(self, query: torch.Tensor, others: torch.Tensor, table: Any) -> None:
        """Fill `shares`.

        Args:
            query: [sessions, query_heads, D], rotated, contiguous. others: float32 [sessions, query_heads],
                the log of the sum of exponentials of the scores of all that is attended to besides.
            table: the layer's `DocumentTable`.
        """
        read = (self._matrices, self._gains, self._offsets)
        codes, scales, planes = table.index
        document = (codes, scales, table.lengths)
        options = {**self._sizes, **self._launch, **self._shape}
        _picked_queries[self.sessions, self.chunks](
            query, planes, *read, self.scaling, DIM=self._dim, **self._shape
        )
        _block_sums[self._blocks * self.chunks, self.sessions](
            *document, *read, self._peaks, self._sums, self._blocks, **options
        )
        share_totals[(self.sessions,)](
            self._peaks, self._sums, others, table.lengths, self.totals, self._blocks,
            ROWS=self.rows, PADDED=triton.next_power_of_2(self.rows), SIZE=64,
            BLOCK=self._sizes["TILE"] * self._sizes["TILES"],
        )  # fmt: skip
        _block_shares[self._blocks, self.sessions](
            *document, *read, self.totals, self.shares, self.capacity, **options
        )
