"""`RebuiltPrefixes`: the keys and values of prefixes that many sequences decode from, kept under a budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from weakref import ref

from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.rebuilt_prefix import RebuiltPrefix, rebuilt_bytes
from xkv_service.kernels.probe import no_memory

_log = logging.getLogger(__name__)
MANY = 8
"""Sequences on one prefix for which reading all of it once is as quick as choosing tokens for each."""
_FEW = MANY // 2
"""With fewer than these tokens are chosen again: between the two nothing changes."""
_IDLE = 256
"""Steps without use after which a rebuilt prefix makes room for another one."""
_PAUSE = 1024
"""Steps without a try where there was no memory."""


class _Kept:
    """A rebuilt prefix, which does not keep the prefix itself alive."""

    def __init__(self, whole: Prefix, step: int, forget: Callable[[ref[Prefix]], None]) -> None:
        self.whole, self.nbytes, self.used = ref(whole, forget), rebuilt_bytes(whole), step
        self.rebuilt = RebuiltPrefix(whole)


class RebuiltPrefixes:
    """Rebuilds a prefix when many sequences decode from it, a layer a step. Not thread-safe.

    A rebuilt prefix goes when the prefix itself is gone, and when another one needs its room and it has not
    been used for a while.

    Args:
        budget: bytes on the device for keys and values; 0: nothing is rebuilt.

    Attributes:
        nbytes: kept, when a step was heeded last.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._step, self._pause = budget, 0, 0
        self._kept: list[_Kept] = []
        self._used: frozenset[int] = frozenset()
        self._told_too_large = False
        self.nbytes = 0

    def of(self, prefix: Prefix) -> RebuiltPrefix | None:
        """Keys and values of the whole prefix, if sequences of the step that was heeded shall use them."""
        found = self._find(prefix) if id(prefix) in self._used else None
        return found.rebuilt if found is not None and found.rebuilt.complete else None

    @property
    def numbers(self) -> frozenset[int]:
        """Of what is kept: no other rebuilt prefix has them."""
        return frozenset(one.rebuilt.number for one in self._kept)

    def heed(self, prefixes: Sequence[Prefix]) -> None:
        """Before a step of sequences, one on each of these prefixes: keep what pays, a layer further.

        It never fails: where a prefix cannot be rebuilt, tokens are chosen.
        """
        if not self._budget:
            return
        self._step, self._pause = self._step + 1, max(0, self._pause - 1)
        counts = Counter(prefixes)
        least = {prefix: _FEW if id(prefix) in self._used else MANY for prefix in counts}
        many = [prefix for prefix, count in counts.most_common() if count >= least[prefix]]
        self._used = frozenset(map(id, many))
        try:
            self._go_on(many)
        except Exception as error:  # noqa: BLE001 - sequences go on without
            if no_memory(error):
                _log.warning("no memory for the keys and values of a prefix: %d steps go on without", _PAUSE)
                self._kept = [one for one in self._kept if one.rebuilt.complete]
                self._pause = _PAUSE
            else:
                _log.error("a prefix could not be rebuilt; none is from now on", exc_info=error)
                self.turn_off()
        self.nbytes = self._held()

    def clear(self) -> None:
        """Let all go, where there was no memory: nothing is rebuilt for a while."""
        self._kept, self._used = [], frozenset()
        self._pause, self.nbytes = _PAUSE, 0

    def turn_off(self) -> None:
        """Let all go, and rebuild nothing from now on."""
        self.clear()
        self._budget = 0

    def _go_on(self, many: list[Prefix]) -> None:
        self._kept = [one for one in self._kept if one.whole() is not None]
        found = [(prefix, self._find(prefix)) for prefix in many]
        for _, kept in found:
            if kept is not None:
                kept.used = self._step
        for prefix, kept in found:
            if kept is not None and not kept.rebuilt.complete:
                kept.rebuilt.rebuild_next(prefix.whole)
                return
        for prefix, kept in found:
            if kept is None and not self._pause and self._make_room(prefix.whole):
                self._kept = [*self._kept, _Kept(prefix.whole, self._step, self._forget)]
                return

    def _find(self, prefix: Prefix) -> _Kept | None:
        return next((one for one in self._kept if one.whole() is prefix.whole), None)

    def _make_room(self, whole: Prefix) -> bool:
        """Let those go that have not been used for longest, if that is enough."""
        nbytes = rebuilt_bytes(whole)
        if nbytes > self._budget and not self._told_too_large:
            self._told_too_large = True
            _log.info("prefixes of %d tokens are not rebuilt: that takes %d bytes", whole.tokens, nbytes)
        unused = (one for one in self._kept if self._step - one.used > _IDLE)
        idle = sorted(unused, key=lambda one: one.used)
        if self._held() - sum(one.nbytes for one in idle) + nbytes > self._budget:
            return False
        while self._held() + nbytes > self._budget:
            longest = idle.pop(0)
            self._kept = [one for one in self._kept if one is not longest]
        return True

    def _forget(self, gone: ref[Prefix]) -> None:
        """A prefix is no more, on whatever thread."""
        self._kept = [one for one in self._kept if one.whole is not gone]

    def _held(self) -> int:
        return sum(one.nbytes for one in self._kept)
