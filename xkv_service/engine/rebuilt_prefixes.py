"""`RebuiltPrefixes`: the keys and values of prefixes that many sequences decode from, kept under a budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.rebuilt_prefix import RebuiltPrefix, rebuilt_bytes
from xkv_service.kernels.probe import no_memory

_log = logging.getLogger(__name__)
MANY = 8
"""Sequences on one prefix for which reading all of it once is as quick as choosing tokens for each."""
_FEW = MANY // 2
"""With fewer than these tokens are chosen again: between the two nothing changes."""
_PAUSE = 1024
"""Steps without a try where there was no memory."""


class RebuiltPrefixes:
    """Rebuilds a prefix when many sequences decode from it, a layer a step. Not thread-safe.

    A rebuilt prefix goes with its prefix, or when another one needs its room and nobody decodes from it.

    Args:
        budget: bytes on the device for keys and values; 0: nothing is rebuilt.

    Attributes:
        nbytes: kept, or about to be, when a step was heeded last.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._pause = budget, 0
        self._kept: WeakKeyDictionary[Prefix, RebuiltPrefix] = WeakKeyDictionary()
        self._used: frozenset[int] = frozenset()
        self.nbytes = 0

    def of(self, prefix: Prefix) -> RebuiltPrefix | None:
        """Keys and values of the whole prefix, if sequences of the step that was heeded shall use them."""
        found = self._kept.get(prefix.whole)
        return found if found is not None and found.complete and id(prefix.whole) in self._used else None

    def heed(self, prefixes: Sequence[Prefix]) -> None:
        """Before a step of sequences, one on each of these prefixes: keep what pays, a layer further.

        It never fails: where a prefix cannot be rebuilt, tokens are chosen.
        """
        if not self._budget:
            return
        counts = Counter(prefix.whole for prefix in prefixes)
        least = {whole: _FEW if id(whole) in self._used else MANY for whole in counts}
        self._used = frozenset(id(whole) for whole, count in counts.items() if count >= least[whole])
        self._pause = max(0, self._pause - 1)
        try:
            self._go_on(counts)
        except Exception as error:  # noqa: BLE001 - sequences go on without
            for prefix in [one for one, made in self._kept.items() if not made.complete]:
                del self._kept[prefix]
            if no_memory(error):
                _log.warning("no memory for the keys and values of a prefix: %d steps go on without", _PAUSE)
                self._pause = _PAUSE
            else:
                _log.error("a prefix could not be rebuilt; none is from now on", exc_info=error)
                self._budget = 0
        self.nbytes = self._held()

    def clear(self) -> None:
        """Let all go."""
        self._kept.clear()
        self._used, self.nbytes = frozenset(), 0

    def _go_on(self, counts: Counter[Prefix]) -> None:
        for prefix, made in self._kept.items():
            if prefix in counts and not made.complete:
                made.rebuild_next(prefix)
                return
        if self._pause:
            return
        for prefix, count in counts.most_common():
            if count < MANY:
                return
            if prefix not in self._kept and self._make_room(rebuilt_bytes(prefix), counts):
                self._kept[prefix] = RebuiltPrefix(prefix)
                return

    def _make_room(self, nbytes: int, counts: Counter[Prefix]) -> bool:
        """Let those go that nobody decodes from, the oldest first, if that is enough."""
        idle = [prefix for prefix in self._kept if prefix not in counts]
        if self._held() - sum(map(rebuilt_bytes, idle)) + nbytes > self._budget:
            return False
        for prefix in idle:
            if self._held() + nbytes <= self._budget:
                break
            del self._kept[prefix]
        return True

    def _held(self) -> int:
        return sum(map(rebuilt_bytes, self._kept))
