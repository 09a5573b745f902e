"""Chunk landmarks and outlier chunks (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Landmarks:
    """One layer's landmarks.

    Args:
        means: [chunks, kv_heads, D], mean rotated keys. chunk: tokens of each; the last may have fewer.
    """

    means: torch.Tensor
    chunk: int


def landmarks(keys: torch.Tensor, chunk: int) -> torch.Tensor:
    """The mean rotated key of each chunk of tokens, per KV head.

    Args:
        keys: [t, kv_heads, D] rotated keys, any float dtype. chunk: tokens per landmark; the last chunk of
            `keys` may be shorter.

    Returns:
        float32 [ceil(t / chunk), kv_heads, D].
    """
    whole = keys.shape[0] // chunk * chunk
    means = keys[:whole].reshape(-1, chunk, *keys.shape[1:]).mean(1, dtype=torch.float32)
    if whole == keys.shape[0]:
        return means
    return torch.cat([means, keys[whole:].mean(0, keepdim=True, dtype=torch.float32)])


def chunk_likeness(keys: torch.Tensor, chunk: int) -> torch.Tensor:
    """How well each whole chunk is spoken for by its landmark: its least cosine over tokens and KV heads.

    Args:
        keys: [t, kv_heads, D] rotated keys.

    Returns:
        float32 [t // chunk]; a chunk of equal keys has 1.
    """
    whole = keys.shape[0] // chunk * chunk
    chunks = keys[:whole].reshape(-1, chunk, *keys.shape[1:]).float()
    cosines = torch.nn.functional.cosine_similarity(chunks, chunks.mean(1, keepdim=True), dim=-1)
    return cosines.amin((1, 2))


def outlier_chunks(likeness: torch.Tensor, count: int, first: int, last: int) -> list[int]:
    """The `count` chunks least like their landmark among chunks `first` to `last` - 1, in order."""
    worst = likeness[first:last].sort(stable=True).indices[:count] + first
    return sorted(worst.tolist())
