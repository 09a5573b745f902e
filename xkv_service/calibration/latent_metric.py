"""Which errors of latents (MLA) matter: those that the expansion makes large in scores or in outputs.

An error e of a latent is an error K_h e of head h's key and V_h e of its value, where K_h and V_h belong to
the layer's own, linear `expand_kv`. Latents do not turn, so both reach scores and outputs as they are.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from xkv_service.decoding.latent import Expansion
from xkv_service.factorization.weights import output_metric, output_projection
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout

_FLOOR = 1e-3


def expansion_maps(
    model: PreTrainedModel, layer: LayerLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From a latent to each head's key and value, and from a rotated key to its key.

    Returns:
        float32 [heads, rank, D], [heads, rank, Dv], [heads, rope_dim, D].

    Raises:
        UnsupportedModel: they are not linear.
    """
    module = inspect_loaded(model).modules[layer.index]
    expansion = Expansion(module, model.dtype, torch.float32)
    return expansion.maps(layer.head_dim, layer.value_dim, model.device)


def latent_metric(model: PreTrainedModel, layer: LayerLayout, queries: torch.Tensor) -> torch.Tensor:
    """The sum of what an error does to scores, Σ_h K_h E[q qᵀ] K_hᵀ, and to outputs, Σ_h V_h W_oᵀW_o V_hᵀ,
    each over its own trace, since nothing says which of the two weighs more; made definite.

    Args:
        queries: float64 [heads, D, D], covariances of the queries.

    Returns:
        float64 [1, rank, rank].
    """
    keys, values, _ = expansion_maps(model, layer)
    parts = [_of_unit_trace(keys.double() @ queries, keys.double())]
    module = inspect_loaded(model).modules[layer.index]
    projection = output_projection(module, layer.query_heads * values.shape[-1])
    if projection is not None:
        weights = output_metric(projection, layer.query_heads, layer.query_heads)
        parts.append(_of_unit_trace(values.double() @ weights, values.double()))
    eye = torch.eye(layer.head_dim, dtype=torch.float64, device=keys.device)
    metric: torch.Tensor = torch.stack(parts).sum(0) + _FLOOR / layer.head_dim * eye
    return ((metric + metric.T) / 2)[None]


def _of_unit_trace(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ_h left_h right_hᵀ over its trace."""
    summed = (left @ right.mT).sum(0)
    return summed / summed.trace().clamp_min(torch.finfo(torch.float32).tiny)
