"""Tokens kept exact: the prefix's first and last tokens and its outlier chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.spec import CompressionSpec


@dataclass(frozen=True)
class ExactTokens:
    """One layer's exact tokens.

    Args:
        positions: int32 [n], ascending. keys: [n, kv_heads, D] before RoPE. values: [n, kv_heads, Dv].
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def always_exact(tokens: int, spec: CompressionSpec) -> tuple[int, int]:
    """(a, b): positions below a and from b on are kept exact in every layer of a prefix of `tokens`."""
    sink = min(spec.sink, tokens)
    return sink, max(sink, tokens - spec.recent)


def low_rank_span(tokens: int, spec: CompressionSpec) -> tuple[int, int]:
    """First and one past the last token that the factors alone must describe; all where none are left."""
    sink, recent = always_exact(tokens, spec)
    return (sink, recent) if recent > sink else (0, tokens)


def outlier_range(tokens: int, spec: CompressionSpec) -> tuple[int, int]:
    """First and one past the last chunk that may be an outlier: whole chunks between sink and recent."""
    sink, recent = always_exact(tokens, spec)
    first, last = -(-sink // spec.landmark_chunk), recent // spec.landmark_chunk
    return first, max(first, last)


def exact_count(tokens: int, spec: CompressionSpec) -> int:
    """Tokens kept exact in each layer: known before anything is computed."""
    sink, recent = always_exact(tokens, spec)
    first, last = outlier_range(tokens, spec)
    return sink + tokens - recent + min(spec.outlier_chunks, last - first) * spec.landmark_chunk


def exact_positions(tokens: int, spec: CompressionSpec, outliers: Sequence[int]) -> list[int]:
    """Ascending positions of the exact tokens, given the layer's outlier chunks."""
    sink, recent = always_exact(tokens, spec)
    size = spec.landmark_chunk
    between = [position for chunk in sorted(outliers) for position in range(chunk * size, (chunk + 1) * size)]
    return [*range(sink), *between, *range(recent, tokens)]
