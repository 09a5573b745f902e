"""Random documents, queries and tails of small shapes, as the decode kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xkv_service.kernels.document_table import ALWAYS, CHOOSABLE, DocumentLayer
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.packed_factors import PackedFactors, Runs, pack
from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch, encode

POSITIONS = 1024


@dataclass(frozen=True)
class Shapes:
    """Of one layer."""

    kv_heads: int = 2
    group: int = 4
    dim: int = 32
    value_dim: int = 32
    planes: int = 8
    rank_k: int = 48
    rank_v: int = 80

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group


SMALL = Shapes()


def packed_runs(kind: str, rank: int) -> Runs:
    """Columns of each width: all three ("mixed"), 8 and 2 bits ("8+2"), or one alone ("4", "2")."""
    if kind == "mixed":
        return (8, rank // 4), (4, rank // 3), (2, rank - rank // 4 - rank // 3)
    return ((8, rank // 3), (2, rank - rank // 3)) if kind == "8+2" else ((int(kind), rank),)


def factors(tokens: int, rank: int, kind: str, dtype: torch.dtype) -> torch.Tensor | PackedFactors:
    """Token factors: of `dtype` ("float"), "int8", or of packed bits (`packed_runs`)."""
    values = torch.randn(tokens, rank) * torch.linspace(1.0, 0.2, rank)
    if kind == "float":
        return values.to(dtype)
    if kind == "int8":
        return (values * 40).round().clamp(-127, 127).to(torch.int8)
    runs, pieces = packed_runs(kind, rank), []
    for bits, count in runs:
        levels = torch.randint(0, 2**bits, (tokens, count))
        whole = levels.sub(128).clamp(-127) if bits == 8 else 2 * levels - (2**bits - 1)
        pieces.append(pack(whole.to(torch.int8), bits))
    return PackedFactors(runs, tuple(pieces))


def document(
    tokens: int, kind: str, dtype: torch.dtype, device: torch.device, shapes: Shapes = SMALL, seed: int = 0,
    scaled: bool = False, chunk: int = 0,
) -> DocumentLayer:  # fmt: skip
    """One layer of a document of random numbers; the first 4 tokens are exact, the last 3 always rebuilt.

    Its index is a key sketch, or with a `chunk` landmarks of `dtype`; of a last shorter chunk all tokens are
    rebuilt always, as in decoding.
    """
    torch.manual_seed(seed)
    heads, dim = shapes.kv_heads, shapes.dim
    order = torch.stack([torch.randperm(dim // 2)[: shapes.planes] for _ in range(heads)])
    planes = torch.stack([order, order + dim // 2], -1).to(torch.int16)
    codes, scales = encode(torch.randn(tokens, heads, dim), planes)
    states = torch.full((tokens,), CHOOSABLE, dtype=torch.uint8)
    states[:4], states[-3:] = 0, ALWAYS
    index: KeySketch | Landmarks = KeySketch(planes.to(device), codes.to(device), scales.to(device))
    if chunk:
        states[tokens // chunk * chunk :] = ALWAYS
        index = Landmarks(torch.randn(-(-tokens // chunk), heads, dim).to(device, dtype), chunk)
    rows = [FactorRows.of(factors(tokens, rank, kind, dtype)) for rank in (shapes.rank_k, shapes.rank_v)]
    size = 1.0 if kind == "float" else 0.05
    key_bases = size * torch.randn(shapes.rank_k, heads * dim) / shapes.rank_k**0.5
    value_bases = size * torch.randn(heads, shapes.rank_v, shapes.value_dim)
    scale = [(0.5 + torch.rand(rank)).to(device, dtype) for rank in (shapes.rank_k, shapes.rank_v)]

    def moved(row: FactorRows) -> FactorRows:
        return FactorRows(row.layout, row.data.to(device))

    return DocumentLayer(
        index, states.to(device), moved(rows[0]), moved(rows[1]), key_bases.to(device, dtype),
        value_bases.to(device, dtype), scale[0] if scaled else None, scale[1] if scaled else None,
    )  # fmt: skip


def queries(sessions: int, dtype: torch.dtype, device: torch.device, shapes: Shapes = SMALL) -> torch.Tensor:
    """[sessions, query_heads, D]."""
    return (2 * torch.randn(sessions, shapes.query_heads, shapes.dim)).to(device, dtype)


def tails(
    lengths: list[int], dtype: torch.dtype, device: torch.device, shapes: Shapes = SMALL, capacity: int = 80
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of every session's tail, NaN behind its end, and int32 lengths."""
    made = []
    for dim in (shapes.dim, shapes.value_dim):
        states = torch.randn(len(lengths), shapes.kv_heads, capacity, dim)
        for row, length in zip(states, lengths, strict=True):
            row[:, length:] = torch.nan
        made.append(states.to(device, dtype))
    return made[0], made[1], torch.tensor(lengths, dtype=torch.int32, device=device)


def turns(
    dtype: torch.dtype, device: torch.device, shapes: Shapes = SMALL
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position."""
    half = shapes.dim // 2
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN never passes a comparison."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
