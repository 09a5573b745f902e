"""`Prefix`: a compressed prefix bound to the model that decodes from it, shared by all its sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.decoding.latent import Expansion, LatentPrefix
from xkv_service.decoding.layer_prefix import LayerPrefix, ReadablePrefix, Turns
from xkv_service.decoding.matching import check_model
from xkv_service.errors import InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.linear_state import LayerState
from xkv_service.numeric import is_integer
from xkv_service.reconstruct import as_cached

# A model object, where and in which dtype it is, and tokens of the prefix.
_Place = tuple[int, torch.device, torch.dtype, int]
_BOUND: WeakKeyDictionary[PrefixFactors, dict[_Place, Prefix]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first p tokens of a compressed prefix, ready to be attended to.

    Args:
        model: the model it was made with. token_ids: int64 [p], on the CPU.
        layers: by layer index, the compressed layers. modules: their attention modules.
        groups: layer indices of those that share token factors.
        windows: by layer index, keys (rotated) and values [1, kv_heads, w, D] of sliding layers.
        states: by layer index, of linear-attention layers.
    """

    model: PreTrainedModel
    token_ids: torch.Tensor
    layers: dict[int, ReadablePrefix]
    modules: dict[int, nn.Module]
    groups: tuple[tuple[int, ...], ...]
    windows: dict[int, tuple[torch.Tensor, torch.Tensor]]
    states: Mapping[int, LayerState]

    @property
    def tokens(self) -> int:
        """p, tokens of the prefix."""
        return self.token_ids.numel()

    @classmethod
    def of(cls, model: PreTrainedModel, factors: PrefixFactors, tokens: int | None = None) -> Prefix:
        """The prefix of `tokens` tokens (by default all), the same object for the same arguments.

        Raises:
            ModelMismatch: the factors were made with another model.
            UnsupportedModel: the model's cache cannot be compressed.
            InvalidSpec: `tokens` is out of range.
        """
        count = _checked(factors, tokens)
        known = _BOUND.setdefault(factors, {})
        name = (id(model), model.device, model.dtype, count)
        # Each time: an adapter may have been loaded since.
        check_model(model, factors)
        if name not in known or known[name].model is not model:
            known[name] = _bind(model, factors, count)
        return known[name]


def _checked(factors: PrefixFactors, tokens: int | None) -> int:
    count = factors.tokens if tokens is None else tokens
    if not is_integer(count) or not 0 < count <= factors.tokens:
        raise InvalidSpec(
            f"tokens={tokens!r} is out of range", hint=f"use an integer from 1 to {factors.tokens}"
        )
    if count < factors.tokens and factors.whole_only:
        kept = "sliding windows" if factors.windows else "linear-attention states"
        raise InvalidSpec(
            f"tokens={count}: this model's {kept} are known after all {factors.tokens} tokens only",
            hint="use the whole prefix",
        )
    return count


def _bind(model: PreTrainedModel, factors: PrefixFactors, tokens: int) -> Prefix:
    device, dtype = model.device, _product_dtype(model)
    turns = [Turns(table, tokens, device) for table in factors.rotary]
    modules = inspect_loaded(model).modules
    layers: dict[int, ReadablePrefix] = {}
    for group in factors.groups:
        for layer, table in zip(group.layout.layers, group.layout.rotary, strict=True):
            if group.layout.latent:
                expansion = Expansion(modules[layer], model.dtype, dtype)
                layers[layer] = LatentPrefix(factors, layer, tokens, expansion, device)
            else:
                layers[layer] = LayerPrefix(factors, layer, tokens, turns[table], device, dtype)
    windows = {
        layer: (as_cached(window.keys, model), as_cached(window.values, model))
        for layer, window in factors.windows.items()
    }
    groups = tuple(group.layout.layers for group in factors.groups)
    return Prefix(model, factors.token_ids[:tokens].long(), layers, modules, groups, windows, factors.states)


def _product_dtype(model: PreTrainedModel) -> torch.dtype:
    """16-bit products pay on accelerators only."""
    return torch.float32 if model.device.type == "cpu" else model.dtype
