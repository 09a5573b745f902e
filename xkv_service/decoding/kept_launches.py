"""`KeptLaunches`: what the kernels of a decode step need of a batch, kept while the batch stays the same."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xkv_service.decoding.kernel_choice import takes, why_not
from xkv_service.decoding.scoring import Scoring

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache
    from xkv_service.decoding.kernel_step import DecodeLaunch

Launches = list[tuple[list[int], "DecodeLaunch"]]
"""Places in a batch that one launch serves, and the launch."""


class KeptLaunches:
    """The launches of the batch that was asked for last. Not thread-safe: each runner and cache has its own.

    They go when another batch is asked for, or when one of its sequences is no more: no prefix is kept alive.
    """

    def __init__(self) -> None:
        self._batch: list[tuple[weakref.ref[Any], int]] = []
        self._launches: Launches = []

    def of(self, caches: Sequence[XKVCache], scoring: Scoring) -> Launches:
        """How kernels attend for a batch of caches, which have got the keys and values of one token each.

        Returns:
            Nothing of caches that kernels do not take (`why_not`): they attend in PyTorch.
        """
        if not caches or not takes(scoring):
            return []
        # A cache that is reset or folded has other selections than before; forks have the same.
        batch = [_first_layer(cache) for cache in caches]
        same = len(batch) == len(self._batch) and all(
            known() is selection and held == rows
            for (known, held), (selection, rows) in zip(self._batch, batch, strict=True)
        )
        if not same:
            self._forget()
            self._launches = _launches(caches, scoring)
            forget = _forgetting(self)
            self._batch = [(weakref.ref(selection, forget), rows) for selection, rows in batch]
        return self._launches

    def _forget(self) -> None:
        self._batch, self._launches = [], []


def _first_layer(cache: XKVCache) -> tuple[Any, int]:
    """The selection of the first compressed layer, and the rows of its tail."""
    layer: Any = cache.layers[cache.prefix.compressed[0]]
    return getattr(layer, "selection", None) or layer, layer.keys.shape[0]


def _forgetting(kept: KeptLaunches) -> Any:
    """A callback that does not keep `kept` alive."""
    mine = weakref.ref(kept)

    def forget(_: object) -> None:
        found = mine()
        if found is not None:
            found._forget()

    return forget


def _launches(caches: Sequence[XKVCache], scoring: Scoring) -> Launches:
    taken = [place for place, cache in enumerate(caches) if why_not(cache, scoring) is None]
    if not taken:
        return []
    from xkv_service.decoding.kernel_step import DecodeLaunch, layout_of

    by_layout: dict[Any, list[int]] = {}
    for place in taken:
        by_layout.setdefault(layout_of(caches[place]), []).append(place)
    return [(places, DecodeLaunch([caches[place] for place in places])) for places in by_layout.values()]
