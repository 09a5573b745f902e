"""`Prefill`: the exact cache of one prefix, and what was observed while it was made."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from xkv_service.kernels.wide_copy import copy_states
from xkv_service.modeling.layout import ModelLayout
from xkv_service.modeling.linear_state import LayerState
from xkv_service.modeling.rotary import RotaryTable, rotate_planes
from xkv_service.modeling.rotary_probe import RotaryForm
from xkv_service.modeling.rotary_source import Frequencies, fit_table
from xkv_service.prefilling.prefix_cache import ExactLayer, StorageLayer, copy_exact_layer

PlaneTables = tuple[torch.Tensor, torch.Tensor]


class Prefill:
    """The exact cache of a prefix of T tokens, held once, in the model's dtype and on its device.

    A latent layer (MLA) has its latents as keys (one head, never rotated) and its rotated keys as values.

    Attributes:
        token_ids: int64 [T], on the CPU.
        layout: the cache's layers.
        device: where keys, values and logits are.
        tail: last positions whose logits were kept.
        logits_tail: float32 [tail, vocabulary]: logits at positions T - tail .. T - 1 (each predicts the next
            token), or None when tail is 0.
    """

    def __init__(
        self,
        *,
        config: Any,
        layout: ModelLayout,
        token_ids: torch.Tensor,
        keys: dict[int, torch.Tensor],
        values: dict[int, torch.Tensor],
        ended: dict[int, ExactLayer],
        at_tail: dict[int, ExactLayer],
        tail: int,
        logits_tail: torch.Tensor | None,
        energy: dict[int, torch.Tensor],
        forms: dict[int, RotaryForm],
        tables: dict[int, PlaneTables],
        frequencies: list[Frequencies],
    ) -> None:
        self.layout, self.token_ids = layout, token_ids
        self.tail, self.logits_tail = tail, logits_tail
        self.device = next(iter(keys.values())).device
        self._config = config
        self._keys, self._values = keys, values
        self._ended, self._at_tail = ended, at_tail
        self._energy, self._forms, self._tables = energy, forms, tables
        self._frequencies = frequencies
        self._rotary: dict[int | None, RotaryTable] = {}

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""
        return self.token_ids.numel()

    def keys(
        self, layer: int, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Keys before RoPE of positions start .. stop - 1: [t, kv_heads, D], new."""
        rotated = self.rotated_keys(layer, start, stop)
        out = torch.empty(rotated.shape, dtype=dtype, device=rotated.device)
        return self._forms[layer].unrotate(rotated, *self.cos_sin(layer, start, stop), out)

    def rotated_keys(self, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Keys as cached, a view [t, kv_heads, D] in the model's dtype."""
        return self._keys[layer][0, :, start:stop].transpose(0, 1)

    def values(self, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Values as cached, a view [t, kv_heads, Dv] in the model's dtype."""
        return self._values[layer][0, :, start:stop].transpose(0, 1)

    def window(self, layer: int) -> PlaneTables:
        """Keys and values a sliding layer keeps after the prefix, [w, kv_heads, D], keys rotated."""
        kept = self._ended[layer]
        assert kept.keys is not None and kept.values is not None
        return kept.keys[0].transpose(0, 1), kept.values[0].transpose(0, 1)

    def state(self, layer: int) -> LayerState:
        """Copies of the states a linear-attention layer has after the prefix."""
        return LayerState.of(self._ended[layer])

    def query_energy(self, layer: int) -> torch.Tensor:
        """Mean square of the rotated queries over the prefix: float32 [query_heads, D]."""
        return self._energy[layer]

    def planes(self, layer: int) -> torch.Tensor:
        """int64 [P, 2]: pairs of key dimensions that RoPE turns together; P = 0 in a layer without RoPE."""
        return self._forms[layer].planes

    def cos_sin(self, layer: int, start: int = 0, stop: int | None = None) -> PlaneTables:
        """cos and sin [t, P] that positions start .. stop - 1 were rotated with, in the model's dtype."""
        if layer not in self._tables:
            positions = range(self.tokens)[start:stop]
            empty = torch.empty(len(positions), 0, device=self.device)
            return empty, empty
        cos, sin = self._tables[layer]
        return cos[start:stop], sin[start:stop]

    def rotary(self, layer: int) -> RotaryTable:
        """How the layer is rotated at any position, storable; layers of a kind share one object."""
        kind = id(self._tables[layer]) if layer in self._tables else None
        if kind not in self._rotary:
            self._rotary[kind] = fit_table(self.planes(layer), *self.cos_sin(layer), self._frequencies)
        return self._rotary[kind]

    @torch.inference_mode()
    def replace(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
        """Overwrite the cache from position `start` on.

        Args:
            keys: before RoPE, any float dtype [t, kv_heads, D].
            values: any float dtype [t, kv_heads, Dv].
        """
        stop = start + keys.shape[0]
        angles = self.cos_sin(layer, start, stop)
        rotate_planes(keys, self.planes(layer), *angles, out=self.rotated_keys(layer, start, stop))
        copy_states(self.values(layer, start, stop), values)

    def cache(self, tokens: int | None = None) -> DynamicCache:
        """A Transformers cache of the first `tokens` tokens, in this prefill's own memory (batch of one).

        Tokens run through it overwrite the keys and values of the positions behind `tokens` here. With
        sliding-window or linear-attention layers `tokens` is T or T - tail.

        Raises:
            ValueError: `tokens` is out of range or between what those layers allow.
        """
        length = self.tokens if tokens is None else tokens
        if not 0 < length <= self.tokens:
            raise ValueError(f"tokens={length} is out of range: the prefix has {self.tokens}")
        cache = DynamicCache(config=self._config)
        for index, keys in self._keys.items():
            cache.layers[index] = StorageLayer(self.tokens, keys, self._values[index], length)
        for index, layer in self._exact_layers(length).items():
            cache.layers[index] = copy_exact_layer(layer)
        return cache

    def _exact_layers(self, length: int) -> dict[int, ExactLayer]:
        if length == self.tokens or not self._ended:
            return self._ended
        if length != self.tokens - self.tail:
            raise ValueError(
                f"tokens={length}: sliding windows and linear-attention states are known at {self.tokens} "
                f"and {self.tokens - self.tail} only"
            )
        return self._at_tail

    def free(self) -> None:
        """Let go of every tensor; the object cannot be used any more."""
        for held in (
            self._keys,
            self._values,
            self._ended,
            self._at_tail,
            self._energy,
            self._tables,
        ):
            held.clear()
        self.logits_tail = None
