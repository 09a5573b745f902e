"""`Residents`: what is kept in memory under a budget of bytes, least recently used out, pinned last."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    value: Any
    nbytes: int
    needs: str | None


class Residents:
    """Values by key, their bytes never above the budget, reservations included. Not thread-safe.

    A value that is held stays. One that is pinned leaves for pinned ones alone, and after all that are not.
    Room is reserved before a value is made, so that values that are made at the same time do not exceed the
    budget together.

    Args:
        budget: bytes.

    Attributes:
        evictions: values that had to leave, since the start. pinned_evictions: those that were pinned.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.evictions = 0
        self.pinned_evictions = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self._holds: Counter[str] = Counter()
        self._pins: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Any:
        """The value, which is the most recently used one now, or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].value

    def reserve(self, key: str, nbytes: int) -> bool:
        """Keep room for a value to come, instead of what was reserved for it before; False: there is none."""
        self._reserved.pop(key, None)
        if not self._make_room(nbytes, key):
            return False
        self._reserved[key] = nbytes
        return True

    def cancel(self, key: str) -> None:
        """Give up a reservation, if there is one."""
        self._reserved.pop(key, None)

    def put(
        self, key: str, value: Any, nbytes: int, needs: str | None = None, *, owner: str | None = None
    ) -> bool:
        """Keep a value in the room reserved for it; False: it is larger than that, and there is no more.

        Args:
            key: of a value that is not here yet.
            needs: another value, which must be here, and stays as long as this one does.
            owner: whose pin decides what may leave for it; by default its own.
        """
        self._reserved.pop(key, None)
        if not self._make_room(nbytes, owner or key):
            return False
        if needs is not None:
            self.hold(needs)
        self._entries[key] = _Entry(value, nbytes, needs)
        return True

    def hold(self, key: str) -> None:
        """Keep a value from leaving until it is released as often as it was held.

        Raises:
            KeyError: it is not here.
        """
        if key not in self._entries:
            raise KeyError(key)
        self._entries.move_to_end(key)
        self._holds[key] += 1

    def release(self, key: str) -> None:
        """Undo one `hold`.

        Raises:
            KeyError: nobody holds it.
        """
        if not self._holds[key]:
            del self._holds[key]
            raise KeyError(key)
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]
        self._entries.move_to_end(key)

    def drop(self, key: str) -> None:
        """Let a value go that nobody holds.

        Raises:
            KeyError: it is not here, or held.
        """
        if self._holds[key]:
            raise KeyError(key)
        needs = self._entries.pop(key).needs
        if needs is not None:
            self.release(needs)

    def pin(self, key: str) -> None:
        """Keep a value, here or to come, from leaving for others that are not pinned."""
        self._pins.add(key)

    def unpin(self, key: str) -> None:
        """Undo `pin`; nothing where it is not pinned."""
        self._pins.discard(key)

    def attainable(self, key: str) -> int:
        """Bytes that a value could have if nobody held any other."""
        if key in self._pins:
            return self.budget
        pinned = self._pins.intersection(self._entries)
        return self.budget - self.bytes_of(pinned | self.needed_by(pinned))

    def needed_by(self, keys: Collection[str]) -> set[str]:
        """The values that some others need."""
        return {needs for key in keys if (needs := self._entries[key].needs) is not None}

    def bytes_of(self, keys: Collection[str]) -> int:
        """Bytes of some values."""
        return sum(self._entries[key].nbytes for key in keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def reserved(self) -> int:
        """Bytes reserved for values to come."""
        return sum(self._reserved.values())

    @property
    def values(self) -> dict[str, Any]:
        """All values by key, least recently used first."""
        return {key: entry.value for key, entry in self._entries.items()}

    @property
    def holds(self) -> dict[str, int]:
        """How often each value is held."""
        return dict(self._holds)

    @property
    def pins(self) -> frozenset[str]:
        """Keys that are pinned, here or not."""
        return frozenset(self._pins)

    def _make_room(self, nbytes: int, owner: str) -> bool:
        """Let idle values leave until `nbytes` are free for one; none leaves where that is not enough."""
        leaving = self._leaving(self.nbytes + self.reserved + nbytes - self.budget, owner in self._pins)
        if leaving is None:
            return False
        for key in leaving:
            self.drop(key)
        self.evictions += len(leaving)
        for key in self._pins.intersection(leaving):
            self.pinned_evictions += 1
            _log.warning("%s is pinned, and leaves memory: %d bytes hold no more", key[:12], self.budget)
        return True

    def _leaving(self, short: int, for_pinned: bool) -> list[str] | None:
        """Which values leave so that `short` bytes become free, or None where they cannot. What others need
        may leave when those do.
        """
        leaving: list[str] = []
        holds = Counter(self._holds)
        for stay in (self._pins, frozenset[str]()) if for_pinned else (self._pins,):
            found = True
            while short > 0 and found:
                found = False
                for key, entry in self._entries.items():
                    if short <= 0:
                        break
                    if key in leaving or holds[key] or key in stay:
                        continue
                    leaving.append(key)
                    short -= entry.nbytes
                    found = True
                    if entry.needs is not None:
                        holds[entry.needs] -= 1
        return leaving if short <= 0 else None
