"""`KeptLaunches`: what the kernels of a decode step need of a batch, kept while the batch stays the same."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

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
        self._batch: list[tuple[weakref.ref[Any], tuple[int, int]]] = []
        self._launches: Launches = []
        self._causal: tuple[weakref.ref[torch.Tensor], bool] | None = None

    def of(
        self, caches: Sequence[XKVCache], scoring: Scoring, counts: Sequence[int] | None = None
    ) -> Launches:
        """How kernels attend for a batch of caches, which have got the keys and values of new tokens.

        Args:
            counts: new tokens of each, at most `MOST_TOKENS`, which see what is before them; by default one.

        Returns:
            Nothing of caches that kernels do not take (`why_not`): they attend in PyTorch.
        """
        if not caches or not takes(scoring):
            return []
        # A cache that is reset or folded has other selections than before; forks have the same.
        counts = counts or [1] * len(caches)
        batch = [_first_layer(cache, count) for cache, count in zip(caches, counts, strict=True)]
        same = len(batch) == len(self._batch) and all(
            known() is selection and held == sizes
            for (known, held), (selection, sizes) in zip(self._batch, batch, strict=True)
        )
        if not same:
            self._forget()
            self._launches = _launches(caches, scoring, counts)
            forget = _forgetting(self)
            self._batch = [(weakref.ref(selection, forget), sizes) for selection, sizes in batch]
        return self._launches

    def is_causal(self, mask: torch.Tensor) -> bool:
        """Whether every new token sees all before it, and itself: asked by all layers, found out once.

        Args:
            mask: [1, 1, t, all tokens], bool.
        """
        if self._causal is None or self._causal[0]() is not mask:
            count, columns = mask.shape[2:]
            seen = torch.ones(count, columns, dtype=torch.bool, device=mask.device).tril_(columns - count)
            self._causal = (weakref.ref(mask), bool((mask[0, 0] == seen).all()))
        return self._causal[1]

    def _forget(self) -> None:
        self._batch, self._launches = [], []


def _first_layer(cache: XKVCache, count: int) -> tuple[Any, tuple[int, int]]:
    """The selection of the first compressed layer, and the rows of its tail and their new tokens."""
    layer: Any = cache.layers[cache.prefix.compressed[0]]
    return getattr(layer, "selection", None) or layer, (layer.keys.shape[0], count)


def _forgetting(kept: KeptLaunches) -> Any:
    """A callback that does not keep `kept` alive."""
    mine = weakref.ref(kept)

    def forget(_: object) -> None:
        found = mine()
        if found is not None:
            found._forget()

    return forget


def _launches(caches: Sequence[XKVCache], scoring: Scoring, counts: Sequence[int]) -> Launches:
    taken = [place for place, cache in enumerate(caches) if why_not(cache, scoring) is None]
    if not taken:
        return []
    from xkv_service.decoding.kernel_step import DecodeLaunch, layout_of

    by_layout: dict[Any, list[int]] = {}
    for place in taken:
        by_layout.setdefault(layout_of(caches[place]), []).append(place)
    return [
        (places, DecodeLaunch([caches[place] for place in places], None, [counts[place] for place in places]))
        for places in by_layout.values()
    ]
