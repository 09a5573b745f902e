"""`Prefix`: a compressed prefix bound to the model that decodes from it, shared by all its sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_artifacts.manifest import GroupLayout
from xkv_service.decoding.derived_index import derived_sketches
from xkv_service.decoding.kernel_choice import kernels_run
from xkv_service.decoding.latent import Expansion, LatentPrefix
from xkv_service.decoding.layer_prefix import DescribedPositions, LayerPrefix, Turns
from xkv_service.decoding.matching import check_model
from xkv_service.decoding.placing import in_rows, on_device
from xkv_service.decoding.scoring import SketchScorer
from xkv_service.errors import InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.linear_state import LayerState
from xkv_service.numeric import is_integer
from xkv_service.reconstruct import as_cached
from xkv_service.selection.reuse import followers, refuse_reuse

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
        reuse: layers that attend to what the compressed layer before them chose.
        longer: the whole prefix of which it is the beginning, or None.
    """

    model: PreTrainedModel
    token_ids: torch.Tensor
    layers: dict[int, LayerPrefix | LatentPrefix]
    modules: dict[int, nn.Module]
    groups: tuple[tuple[int, ...], ...]
    windows: dict[int, tuple[torch.Tensor, torch.Tensor]]
    states: Mapping[int, LayerState]
    reuse: frozenset[int] = frozenset()
    longer: Prefix | None = None

    @property
    def whole(self) -> Prefix:
        """The whole prefix: itself, where it is no other one's beginning."""
        return self.longer or self

    @cached_property
    def leaders(self) -> dict[int, int]:
        """By layer of `reuse`, the one whose choice it takes."""
        order = self.compressed
        return {mine: before for before, mine in zip(order, order[1:], strict=False) if mine in self.reuse}

    @cached_property
    def compressed(self) -> list[int]:
        """The compressed layers, in order."""
        return sorted(layer for group in self.groups for layer in group)

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
            InvalidSpec: `tokens` is out of range, or a layer is to reuse the choice of one of other heads.
        """
        count = factors.tokens if tokens is None else tokens
        _check_tokens(count, factors.tokens, factors.windows, factors.states)
        known = _BOUND.setdefault(factors, {})
        name = (id(model), model.device, model.dtype, count)
        # Each time: an adapter may have been loaded since.
        check_model(model, factors)
        if name not in known or known[name].model is not model:
            whole = count == factors.tokens
            known[name] = _bind(model, factors) if whole else cls.of(model, factors).first(count)
        return known[name]

    def first(self, tokens: int) -> Prefix:
        """The prefix of the first `tokens` tokens: views of this one, so it costs no memory.

        Raises:
            InvalidSpec: `tokens` is out of range, or the prefix can only be used whole.
        """
        _check_tokens(tokens, self.tokens, self.windows, self.states)
        layers = {index: layer.first(tokens) for index, layer in self.layers.items()}
        return replace(self, token_ids=self.token_ids[:tokens], layers=layers, longer=self.whole)


def _check_tokens(
    tokens: int, whole: int, windows: Mapping[int, object], states: Mapping[int, object]
) -> None:
    if not is_integer(tokens) or not 0 < tokens <= whole:
        raise InvalidSpec(f"tokens={tokens!r} is out of range", hint=f"use an integer from 1 to {whole}")
    if tokens < whole and (windows or states):
        kept = "sliding windows" if windows else "linear-attention states"
        raise InvalidSpec(
            f"tokens={tokens}: this model's {kept} are known after all {whole} tokens only",
            hint="use the whole prefix",
        )


def _bind(model: PreTrainedModel, factors: PrefixFactors) -> Prefix:
    binding = Binding(model, factors, [group.layout for group in factors.groups])
    binding.add(factors)
    return binding.prefix


class Binding:
    """A prefix in the making: its groups of layers come one after the other.

    Args:
        model: the model it is bound to. factors: what belongs to no group. groups: all there will be.

    Attributes:
        prefix: it; `layers` holds those that have come.
    """

    def __init__(self, model: PreTrainedModel, factors: PrefixFactors, groups: Sequence[GroupLayout]) -> None:
        support = inspect_loaded(model)
        refuse_reuse(factors.spec.reuse, followers(support.layout.compressible))
        self._turns = [Turns(table, factors.tokens, model.device) for table in factors.rotary]
        self._described = DescribedPositions(factors.tokens, model.device)
        windows = {
            layer: (as_cached(window.keys, model), as_cached(window.values, model))
            for layer, window in factors.windows.items()
        }
        self.prefix = Prefix(
            model=model,
            token_ids=factors.token_ids.long(),
            layers={},
            modules=support.modules,
            groups=tuple(group.layers for group in groups),
            windows=windows,
            states=factors.states,
            reuse=frozenset(factors.spec.reuse),
        )

    def add(self, factors: PrefixFactors) -> None:
        """Bind the groups of `factors`."""
        model = self.prefix.model
        device, dtype = model.device, product_dtype(model)
        positions = {layer: self._described.of(factors, layer) for layer in factors.layers}
        factors = on_device(factors, device)
        if kernels_run(device) and factors.spec.index in ("sketch", "derived"):
            factors = in_rows(factors)
        layers: dict[int, LayerPrefix | LatentPrefix] = {}
        for group in factors.groups:
            for layer, table in zip(group.layout.layers, group.layout.rotary, strict=True):
                if group.layout.latent:
                    expansion = Expansion(self.prefix.modules[layer], model.dtype, dtype)
                    layers[layer] = LatentPrefix(factors, layer, expansion, device, positions[layer])
                else:
                    layers[layer] = LayerPrefix(
                        factors, layer, self._turns[table], device, dtype, positions[layer]
                    )
        _derive_indexes(layers, factors)
        self.prefix.layers.update(layers)


def _derive_indexes(layers: Mapping[int, LayerPrefix | LatentPrefix], factors: PrefixFactors) -> None:
    for group in factors.groups:
        mine = [layers[index] for index in group.layout.layers if index in factors.planes]
        owners = [layer for layer in mine if isinstance(layer, LayerPrefix)]
        for index, sketch in derived_sketches(group.keys.factors, owners, factors.planes).items():
            layers[index].index = SketchScorer(sketch)


def product_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of matrix products over factors: 16 bits pay on accelerators only."""
    return torch.float32 if model.device.type == "cpu" else model.dtype
