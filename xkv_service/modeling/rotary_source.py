"""Where a model's cos and sin come from: its frequencies, and the lengths at which they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.rotary import RotaryTable

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Frequencies:
    """One set of rotary frequencies: angle per position, float32 [n], and the scale of cos and sin."""

    inv_freq: torch.Tensor
    scaling: float


def model_frequencies(model: nn.Module) -> list[Frequencies]:
    """Copies of every set of frequencies the model holds now (longrope and dynamic ones change with use)."""
    found = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                attribute = name.replace("original_", "").replace("inv_freq", "attention_scaling")
                scaling = float(getattr(module, attribute, 1.0))
                found.append(Frequencies(buffer.detach().to(torch.float32, copy=True).flatten(), scaling))
    return found


def fit_table(
    planes: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, candidates: Sequence[Frequencies]
) -> RotaryTable:
    """The most compact table that gives `cos` and `sin` [T, P], observed at positions 0 .. T - 1.

    Frequencies are used when they reproduce every observed number to 1e-6; otherwise the numbers are kept.
    """
    if cos.shape[0] > 1 and planes.shape[0] > 0:
        positions = torch.arange(cos.shape[0], device=cos.device)
        for candidate in candidates:
            table = _matched(planes, cos, sin, candidate)
            found_cos, found_sin = table.cos_sin(positions)
            error = torch.maximum((found_cos - cos).abs().amax(), (found_sin - sin).abs().amax())
            if error <= _TOLERANCE:
                return table
    return RotaryTable(planes, rounding=cos.dtype, cos=cos, sin=sin)


def _matched(
    planes: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, candidate: Frequencies
) -> RotaryTable:
    """For each plane the frequency nearest to the angle observed at position 1."""
    angle = torch.atan2(sin[1].float(), cos[1].float())
    inv_freq = candidate.inv_freq.to(cos.device)
    nearest = (inv_freq[None, :] - angle[:, None]).abs().argmin(1)
    return RotaryTable(planes, inv_freq[nearest], candidate.scaling, cos.dtype)


def frequency_change(config: Any) -> tuple[str, int] | None:
    """The rotary type and the length past which its frequencies change, or None when they never do.

    Args:
        config: a model's config.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = one.get("rope_type")
        if kind == "longrope":
            original = one.get("original_max_position_embeddings")
            return kind, int(original or config.max_position_embeddings)
        if kind == "dynamic":
            return kind, int(config.max_position_embeddings)
    return None


def refuse_unstable_frequencies(config: Any, tokens: int) -> None:
    """Refuse a prefix whose keys would be rotated by frequencies that later tokens change again.

    Raises:
        UnsupportedModel: dynamic-NTK frequencies, and more tokens than the model's original window.
    """
    change = frequency_change(config)
    if change is not None and change[0] == "dynamic" and tokens > change[1]:
        raise UnsupportedModel(
            f"dynamic-NTK rotary embeddings change with every token past {change[1]}: "
            f"a prefix of {tokens} tokens cannot be cached",
            hint=f"use prefixes of at most {change[1]} tokens, or a model with yarn or llama3 scaling",
        )
