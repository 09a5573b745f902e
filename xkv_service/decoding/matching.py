"""Hold an artifact's exact first tokens against what the model computes for them.

An artifact keeps the first tokens exact in every layer, and they depend on nothing but themselves: a forward
of a few tokens shows whether this very model, adapters and revision included, made them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache, PreTrainedModel

from xkv_artifacts.manifest import GroupLayout
from xkv_service.errors import ModelMismatch
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded

TOLERANCE = 0.05
"""Relative distance of all first keys together. Rounding to bfloat16, in the file and in the model's own
sums, stays below 0.02; another checkpoint is near 1."""
_MOST = 16
"""Tokens that are compared, where an artifact keeps so many exact."""


def check_model(model: PreTrainedModel, factors: PrefixFactors) -> None:
    """Refuse factors that `model` did not make.

    Raises:
        ModelMismatch: layers or heads differ, or the first tokens' keys do.
        UnsupportedModel: the model's cache cannot be compressed.
    """
    check_shapes(model, [group.layout for group in factors.groups])
    if any(_leading(factors, layer) for layer in factors.layers):
        first = FirstTokens(model, factors)
        first.add(factors)
        first.check()


class FirstTokens:
    """What a model computes for an artifact's first tokens, held against group after group of it.

    Args:
        factors: what belongs to no group.
    """

    def __init__(self, model: PreTrainedModel, factors: PrefixFactors) -> None:
        count = min(_MOST, factors.spec.sink or _MOST)
        cache = DynamicCache(config=model.config)
        ids = factors.token_ids[None, :count].long().to(model.device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = [layer.index for layer in inspect_loaded(model).layout.compressible]
        keys = [cache.layers[layer].keys[0].transpose(0, 1).float() for layer in layers]
        # To the CPU at once: a device is waited for each time.
        flat = torch.split(torch.cat([one.flatten() for one in keys]).cpu(), [one.numel() for one in keys])
        self._keys = {layer: one.view(key.shape) for layer, one, key in zip(layers, flat, keys, strict=True)}
        self._distance = self._size = 0.0

    def add(self, factors: PrefixFactors) -> None:
        """Compare the layers of some groups."""
        for layer in factors.layers:
            count = min(_leading(factors, layer), len(self._keys[layer]))
            if count:
                expected = _first_keys(factors, layer, count)
                self._distance += float((self._keys[layer][:count] - expected).square().sum())
                self._size += float(expected.square().sum())

    def check(self) -> None:
        """Refuse what was compared.

        Raises:
            ModelMismatch: the keys differ.
        """
        if self._distance > TOLERANCE**2 * self._size:
            raise ModelMismatch(
                "the artifact was made with another model: "
                f"first keys differ by {(self._distance / self._size) ** 0.5:.0%}",
                hint="load the checkpoint, revision and adapters that it was precomputed with",
            )


def check_shapes(model: PreTrainedModel, groups: Iterable[GroupLayout]) -> None:
    """Refuse groups whose layers or heads are not those of `model`.

    Raises:
        ModelMismatch, UnsupportedModel: as `check_model`.
    """
    found = {layer.index: layer for layer in inspect_loaded(model).layout.compressible}
    expected = {
        layer: (heads, width)
        for group in groups
        for layer, heads, width in zip(group.layers, group.kv_heads, group.key_widths, strict=True)
    }
    if {index: (layer.kv_heads, layer.key_width) for index, layer in found.items()} != expected:
        raise ModelMismatch(
            f"the artifact was made with another model: it has {len(expected)} compressed layers, "
            f"{type(model).__name__} has {len(found)}, or their heads differ",
            hint="load the model that it was precomputed with",
        )


def _leading(factors: PrefixFactors, layer: int) -> int:
    """Exact tokens from position 0 on without a gap, at most `_MOST`."""
    if layer not in factors.exact:
        return 0
    positions = factors.exact[layer].positions[:_MOST].tolist()
    return next((i for i, position in enumerate(positions) if i != position), len(positions))


def _first_keys(factors: PrefixFactors, layer: int, count: int) -> torch.Tensor:
    """Keys as a cache holds them, float32 [count, kv_heads, D] on the CPU."""
    group, place = factors.locate(layer)
    table = factors.rotary[group.layout.rotary[place]].to("cpu")
    return table.rotate(factors.exact[layer].keys[:count].cpu(), torch.arange(count))
