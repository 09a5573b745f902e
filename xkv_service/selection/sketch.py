"""Key sketches: a selection index of a few rotary planes per token at 4 bits a dimension.

A sketch keeps, per KV head, the `P` rotary planes where keys and queries have most energy, of the rotated key
of every token: scores against it approximate the exact attention scores. Whole planes are kept, so moving the
prefix to another offset turns a sketch exactly as it turns the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xkv_service.kernels.probe import has_kernels

_LEVELS = 7
_ZERO = 8
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class KeySketch:
    """One layer's sketch.

    Args:
        planes: int16 [kv_heads, P, 2], the dimensions kept of each head.
        codes: uint8 [T, kv_heads, P], two 4-bit numbers (low: first dimension of the plane) of value + 8.
        scales: float16 [T, kv_heads], the size of one step.
    """

    planes: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor


def candidate_planes(planes: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The pairs of dimensions a sketch may keep: the rotary planes, and unrotated dimensions two by two.

    Args:
        planes: int64 [P, 2], pairs that RoPE turns together.

    Returns:
        int64 [head_dim // 2, 2] on the CPU.
    """
    planes = planes.cpu()
    rotated = set(planes.flatten().tolist())
    rest = [dim for dim in range(head_dim) if dim not in rotated]
    pairs = torch.tensor(rest[: len(rest) // 2 * 2], dtype=torch.int64).reshape(-1, 2)
    return torch.cat([planes, pairs])


def choose_planes(
    key_energy: torch.Tensor, query_energy: torch.Tensor, candidates: torch.Tensor, count: int
) -> torch.Tensor:
    """The planes of most key energy times query energy.

    Args:
        key_energy: [kv_heads, D] mean squares of the keys.
        query_energy: [query_heads, D] mean squares of the rotated queries.
        candidates: int64 [n, 2]. count: planes to keep, at most n.

    Returns:
        int16 [kv_heads, min(count, n), 2], most energy first.
    """
    kv_heads, dim = key_energy.shape
    queries = query_energy.double().reshape(kv_heads, -1, dim).sum(1)
    candidates = candidates.to(key_energy.device, non_blocking=True)
    score = key_energy.double()[:, candidates].sum(-1) * queries.to(key_energy.device)[:, candidates].sum(-1)
    best = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return candidates[best].to(torch.int16)


def encode(keys: torch.Tensor, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rotated keys.

    Args:
        keys: [t, kv_heads, D], any float dtype. planes: int16 [kv_heads, P, 2].

    Returns:
        uint8 [t, kv_heads, P] and float16 [t, kv_heads].
    """
    if keys.shape[0] and keys.stride(-1) == 1 and has_kernels(keys.device):
        from xkv_service.kernels.encode_sketch import encode_sketch

        return encode_sketch(keys, planes, _LEVELS, _ZERO)
    return encode_plainly(keys, planes)


def encode_plainly(keys: torch.Tensor, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode` in PyTorch: the reference of the kernel."""
    picked = _pick(keys, planes).float()
    scales = (picked.abs().amax(-1) / _LEVELS).clamp_max(_FLOAT16_MAX).half()
    step = scales.float().clamp_min(torch.finfo(torch.float32).tiny)
    levels = (picked / step[..., None]).round_().clamp_(-_LEVELS, _LEVELS).add_(_ZERO).to(torch.uint8)
    return levels[..., 0::2] | levels[..., 1::2] << 4, scales


def decode(sketch: KeySketch) -> torch.Tensor:
    """The kept planes' approximate values, float32 [T, kv_heads, P, 2]."""
    low, high = sketch.codes & 15, sketch.codes >> 4
    levels = torch.stack([low, high], -1).float() - _ZERO
    return levels * sketch.scales.float()[..., None, None]


def scores(queries: torch.Tensor, sketch: KeySketch) -> torch.Tensor:
    """Approximate attention scores, before scaling: the reference for every faster selector.

    Args:
        queries: [n, query_heads, D], rotated; the prefix's keys count from position 0.

    Returns:
        float32 [n, query_heads, T].
    """
    count, query_heads, dim = queries.shape
    kv_heads = sketch.planes.shape[0]
    grouped = queries.float().reshape(count * kv_heads, query_heads // kv_heads, dim)
    index = sketch.planes.long().flatten(1).repeat(count, 1)[:, None].expand(-1, grouped.shape[1], -1)
    picked = grouped.gather(-1, index).reshape(count, kv_heads, grouped.shape[1], -1)
    products = torch.einsum("nhgp,thp->nhgt", picked, decode(sketch).flatten(2))
    return products.reshape(count, query_heads, -1)


def _pick(keys: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """The dimensions of `planes`, in order: [t, kv_heads, 2P]."""
    index = planes.to(keys.device).long().flatten(1)
    return keys.gather(-1, index.expand(keys.shape[0], -1, -1))
