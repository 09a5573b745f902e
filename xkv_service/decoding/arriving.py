"""A prefix whose layers are still being read, and a cache over it whose forward waits for them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.prefix import Prefix
from xkv_service.selection.spec import SelectionSpec


class NotArriving(Exception):
    """The layers that a forward waits for will not come, or nobody wants it any more."""


class Arriving:
    """A prefix of which some layers are there.

    Whoever reads them tells the others with `came`, and with `end` that no more will come. A prefix in use is
    not yet a prefix to trust: its last bytes are not checked before the last layer is there.

    Args:
        prefix: `layers` holds those that are there.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self._ended = False
        self._there: frozenset[int] = frozenset()
        self._ready: torch.cuda.Event | None = None
        self._changed = threading.Condition()

    def came(self, ready: torch.cuda.Event | None = None) -> None:
        """There are more layers.

        Args:
            ready: when a CUDA device has made them; it is waited for on the device alone.
        """
        with self._changed:
            self._there, self._ready = frozenset(self.prefix.layers), ready or self._ready
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait see whether they are stopped."""
        with self._changed:
            self._changed.notify_all()

    def settle(self) -> None:
        """Return when the device has made all layers that came: whoever reads them waits no more."""
        if self._ready is not None:
            self._ready.synchronize()

    def end(self) -> None:
        """No more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, layer: int, stopped: threading.Event) -> None:
        """Return when a layer is there.

        Raises:
            NotArriving: it will not come, or `stopped` was set (and `wake` called).
        """

        def over() -> bool:
            return layer in self._there or self._ended or stopped.is_set()

        with self._changed:
            self._changed.wait_for(over)
            there, ready = layer in self._there, self._ready
        if stopped.is_set() or not there:
            raise NotArriving
        if ready is not None:
            torch.cuda.current_stream(self.prefix.model.device).wait_event(ready)


class ArrivingCache(XKVCache):
    """A cache over a prefix that is still being read: each layer waits for its own.

    Args:
        arriving: the prefix. selection: as in `XKVCache`. stopped: set it, and call `arriving.wake`, to end a
            forward at its next layer.

    Raises:
        NotArriving: of a forward: as `Arriving.wait_for`.
    """

    def __init__(self, arriving: Arriving, selection: SelectionSpec, stopped: threading.Event) -> None:
        self._arriving, self._stopped = arriving, stopped
        super().__init__(arriving.prefix, selection)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `XKVCache.update`, when the layer is there."""
        if isinstance(self.layers[layer_idx], _Awaited):
            self._arriving.wait_for(layer_idx, self._stopped)
            self.layers[layer_idx] = super()._prefix_layer(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def settled(self) -> XKVCache:
        """An ordinary cache with the same tail, when a forward has been through all layers."""
        cache = XKVCache(self.prefix, self.selection)
        cache.layers, cache.tail_ids = self.layers, self.tail_ids
        return cache

    def _prefix_layer(self, index: int) -> DynamicLayer:
        return _Awaited(self.prefix.tokens)


class _Awaited(DynamicLayer):  # type: ignore[misc]
    """In the place of a layer that a forward has not come to: it knows how long the prefix is."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def get_seq_length(self) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens + query_length, 0
