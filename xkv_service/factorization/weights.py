"""Feature weights: which errors of the factorization matter to attention, as linear maps on features.

A weight W changes the objective from |X - AB| to |(X - AB) W|. It is folded into the bases (`A = X W V`,
`B = Vᵀ W⁻¹`), so decoding does not change. Each KV head has its own block:

- keys, "query": the root mean square of its queries in each rotary plane. Both dimensions of a plane get the
  same weight, so it commutes with RoPE and may be applied to keys before RoPE.
- values, "output": the Cholesky factor L of the sum of W_oᵀW_o over its query heads, since an error e of a
  value reaches the residual stream as W_o e and |W_o e| = |Lᵀ e|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_FLOOR = 1e-3
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj", "wo_proj", "output_proj")


@dataclass(frozen=True)
class FeatureWeights:
    """One layer's block-diagonal weight and its inverse, float64 [kv_heads, D, D] each."""

    blocks: torch.Tensor
    inverses: torch.Tensor

    @property
    def width(self) -> int:
        """kv_heads x D."""
        return self.blocks.shape[0] * self.blocks.shape[1]


def plane_energy(energy: torch.Tensor, planes: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Energy per KV head where both dimensions of each rotary plane carry their plane's mean.

    Args:
        energy: [heads, D] mean squares, of queries (heads a multiple of `kv_heads`) or of keys.
        planes: int64 [P, 2]; dimensions in no plane keep their own energy.

    Returns:
        float64 [kv_heads, D].
    """
    heads, dim = energy.shape
    mean = energy.double().reshape(kv_heads, heads // kv_heads, dim).mean(1)
    paired = mean[:, planes].mean(-1)
    mean[:, planes[:, 0]] = paired
    mean[:, planes[:, 1]] = paired
    return mean


def query_weights(energy: torch.Tensor, planes: torch.Tensor, kv_heads: int) -> FeatureWeights:
    """Weights of keys by query energy. Arguments as `query_metric`."""
    return metric_weights(query_metric(energy, planes, kv_heads))


def query_metric(energy: torch.Tensor, planes: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`plane_energy` as a diagonal metric, made definite: float64 [kv_heads, D, D].

    Args:
        energy: [query_heads, D], mean square of the rotated queries (`Prefill.query_energy`).
        planes: int64 [P, 2], dimension pairs RoPE turns together.
    """
    per_head = plane_energy(energy, planes, kv_heads)
    floor = _FLOOR * per_head.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.diag_embed(per_head + floor)


def output_weights(projection: torch.Tensor, query_heads: int, kv_heads: int) -> FeatureWeights:
    """Weights of values by the output projection.

    Args:
        projection: [hidden, query_heads * value_dim], the weight of the attention's output projection.
    """
    return metric_weights(output_metric(projection, query_heads, kv_heads))


def output_metric(projection: torch.Tensor, query_heads: int, kv_heads: int) -> torch.Tensor:
    """The sum of W_oᵀ W_o over each KV head's query heads, made definite: float64 [kv_heads, D, D]."""
    hidden, columns = projection.shape
    dim = columns // query_heads
    per_head = projection.detach().float().reshape(hidden, query_heads, dim).transpose(0, 1)
    energy = (per_head.mT @ per_head).double().reshape(kv_heads, -1, dim, dim).sum(1)
    eye = torch.eye(dim, dtype=torch.float64, device=energy.device)
    mean = energy.diagonal(dim1=-2, dim2=-1).mean()
    return energy + _FLOOR * mean.clamp_min(torch.finfo(torch.float32).tiny) * eye


def metric_weights(metric: torch.Tensor) -> FeatureWeights:
    """The weights W of a metric M = W Wᵀ (`calibration.SharedBasis`): its Cholesky factor.

    Args:
        metric: [kv_heads, D, D], symmetric positive definite.
    """
    factor = torch.linalg.cholesky(metric.double())
    eye = torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
    return FeatureWeights(factor, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False))


def output_projection(module: nn.Module, columns: int) -> torch.Tensor | None:
    """The weight [hidden, columns] of an attention module's output projection, or None when none is found.

    Args:
        columns: query_heads * value_dim.
    """
    for name in _OUTPUT_NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[1] == columns:
            return weight
    return None


def normalized(weights: Sequence[FeatureWeights]) -> list[FeatureWeights]:
    """The weights of a group's layers over their common root mean square.

    Only ratios between features matter; this keeps the bases near orthonormal, safely inside float16.
    """
    energy = sum(float(weight.blocks.square().sum()) for weight in weights)
    scale = (energy / sum(weight.width for weight in weights)) ** 0.5
    return [FeatureWeights(weight.blocks / scale, weight.inverses * scale) for weight in weights]


def apply_blocks(blocks: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """diag(blocks) @ rows: each [kv_heads, D, D] block stack times its rows of [W, n], in rows' dtype."""
    parts, offset = [], 0
    for block in blocks:
        heads, dim = block.shape[:2]
        part = rows[offset : offset + heads * dim].reshape(heads, dim, rows.shape[1])
        parts.append((block.to(rows.dtype) @ part).reshape(heads * dim, rows.shape[1]))
        offset += heads * dim
    return torch.cat(parts)
