"""`PrefixPool`: compressed prefixes in memory under a budget, loaded by threads, once for all who ask.

What is pinned in the store stays in memory rather than what is not. What is gone from it is given to nobody
any more, and leaves when its last user has released it.

A part of an artifact is a prefix of its own here, never pinned. Whoever is given one has the whole loaded,
for which nobody waits; once that is there, the part leaves when its last user has released it.

A request never waits longer than it says, and always gets one answer: the prefix, held for it, or the reason
why there is none. A load that nobody waits for any more goes on, and the next request finds its prefix.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Final

from transformers import PreTrainedModel

from xkv_artifacts.manifest import PartFidelity
from xkv_artifacts.store import ArtifactStore, Standing
from xkv_service.calibration.calibration import Calibration
from xkv_service.decoding.arriving import Arriving
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.alarm import Alarm
from xkv_service.engine.bound_prefix import BoundPrefix
from xkv_service.engine.catalog_upkeep import CatalogUpkeep
from xkv_service.engine.footprint import calibration_bytes
from xkv_service.engine.load_failure import LoadFailure, failure_of
from xkv_service.engine.loader_threads import LoaderThreads
from xkv_service.engine.loading_rates import LoadingRates, Way
from xkv_service.engine.no_room import no_room
from xkv_service.engine.parts import artifact_of, is_part, resident_key
from xkv_service.engine.pool_loads import CALIBRATION, Answer, Load, NoRoom, OnArriving, OnDone, Waiter
from xkv_service.engine.pool_state import PoolState
from xkv_service.engine.prefix_loading import Announced, NoPart, PrefixLoading
from xkv_service.engine.residents import Residents
from xkv_service.engine.storages import held_bytes
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.selection.spec import SelectionSpec

_log = logging.getLogger(__name__)

OnLost = Callable[[str, LoadFailure], None]

_SPARE_THREADS = 6
"""Threads that may be stuck in reads that hang before loads wait for them."""
_LOST: Final[dict[str, str]] = {"corrupt": "damaged", "missing": "missing"}
"""Counters of loads that found it, whether anybody waited for them or not."""


class PrefixPool:
    """Prefixes of one model's artifacts. Every method may be called from any thread, and returns at once.

    Args:
        model: on the device where prefixes shall be. store: where artifacts are.
        selection: what the prefixes will be used with.
        budget_bytes: on the device, for everything that stays: token factors, bases, index, exact tokens,
            cos and sin; on a CPU calibrations too.
        threads: loads at a time.
        fingerprint: of the model, as in `PrefixLoading`.
        rates: by default measured now, by a short prefill.
        on_lost: told on a loader's thread, once for each load that found its blob damaged or missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: ArtifactStore,
        selection: SelectionSpec | None = None,
        budget_bytes: int = 1 << 30,
        threads: int = 2,
        *,
        fingerprint: str | None = None,
        rates: LoadingRates | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        inspect_loaded(model)  # found now: later it would run beside the sequences
        self.rates = rates or LoadingRates.measured(model)
        self._model, self._on_lost = model, on_lost
        self._lock = threading.RLock()
        self._residents = Residents(budget_bytes)
        self._loads: dict[str, Load] = {}
        self._parked: list[Load] = []
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._gone: frozenset[str] = frozenset()
        self._closed = False
        self._loading = PrefixLoading(model, store, selection or SelectionSpec(), fingerprint)
        self._threads = LoaderThreads(threads, threads + _SPARE_THREADS)
        self._alarm = Alarm("prefix-pool-deadlines")
        self._upkeep = CatalogUpkeep(store, self._asked, self._learn)

    def take(self, artifact_id: str, tokens: int, part: PartFidelity | None = None) -> Prefix | None:
        """The prefix of an artifact's first `tokens` tokens if it is resident, held once more; else None.

        Args:
            part: take that part of the artifact.
        """
        with self._lock:
            found = self._take(artifact_id, tokens, part)
            return found if isinstance(found, Prefix) else None

    def request(
        self,
        artifact_id: str,
        tokens: int,
        on_done: OnDone,
        *,
        part: PartFidelity | None = None,
        deadline_s: float | None = None,
        on_arriving: OnArriving | None = None,
    ) -> None:
        """Have the prefix of an artifact's first `tokens` tokens loaded.

        Args:
            on_done: called once, on a thread of the pool, with the prefix, held once for the caller, or with
                what went wrong. It must be quick.
            part: load that part of the artifact.
            deadline_s: when to be told "slow_load" (or "no_room") at the latest; by default after the time
                that prefilling the tokens takes. The load goes on.
            on_arriving: called at most once, on another thread, when the whole prefix begins to be read for
                this request. It must be quick. What is done with it may not be told before `on_done`.
        """
        waiter = Waiter(tokens, on_done, on_arriving)
        wait_s = self.rates.deadline_s(tokens) if deadline_s is None else deadline_s
        with self._lock:
            answer = self._at_once(artifact_id, tokens, part)
            if answer is None:
                load = self._loads.get(resident_key(artifact_id, part)) or self._begin(artifact_id, part)
                load.waiters.append(waiter)
        if answer is None:
            self._alarm.after(wait_s, lambda: self._expire(load, waiter, wait_s))
        else:
            self._later_tell(waiter, answer)

    def decide(self, artifact_id: str, tokens: int, nbytes: int | None = None) -> Way:
        """The faster way to the first `tokens` tokens of an artifact that is not resident.

        Args:
            nbytes: of the artifact, where that is known.
        """
        with self._lock:
            under_way = artifact_id in self._loads
            ahead = sum(not load.overdue and load not in self._parked for load in self._loads.values())
        return self.rates.decide(tokens, nbytes, 1 if under_way else 1 + ahead // self._threads.wanted)

    def prefetch(self, artifact_id: str) -> None:
        """Load an artifact that nobody waits for yet; nothing happens where there is no room."""
        with self._lock:
            self._prefetch(artifact_id)

    def hold(self, key: str) -> None:
        """One more user of a resident prefix: it is not evicted before all have released it.

        Args:
            key: its artifact's id, or of a part `resident_key`.

        Raises:
            KeyError: it is not resident.
        """
        with self._lock:
            self._residents.hold(key)

    def release(self, key: str) -> None:
        """Undo one hold, those of `take` and `request` included. Arguments as `hold`.

        Raises:
            KeyError: nobody holds it.
        """
        with self._lock:
            self._release(key)

    @property
    def idle(self) -> bool:
        """Whether a load would be begun at once: none waits, and a thread is free."""
        with self._lock:
            running = len(self._loads) - len(self._parked)
            return running < self._threads.wanted

    @property
    def loading(self) -> bool:
        """Whether loads run, or wait for a thread."""
        with self._lock:
            return len(self._loads) > len(self._parked)

    @property
    def gone(self) -> frozenset[str]:
        """Artifacts that are gone from the store, and parts, whose prefixes somebody still holds."""
        return self._gone

    @property
    def bytes(self) -> int:
        """Resident bytes, calibrations included."""
        with self._lock:
            return self._residents.nbytes

    def state(self) -> PoolState:
        """What the pool holds and does now."""
        with self._lock:
            residents = self._residents
            evictions = {"evictions": residents.evictions, "pinned_evictions": residents.pinned_evictions}
            pins = residents.pins
            pinned_waits = any(load.key in pins for load in self._parked)
            return PoolState(
                residents.nbytes,
                residents.reserved,
                residents.budget,
                tuple(
                    key
                    for key in residents.values
                    if not key.startswith(CALIBRATION) and not is_part(key) and key not in self._gone
                ),
                {key: count for key, count in residents.holds.items() if not key.startswith(CALIBRATION)},
                pins,
                frozenset() if pinned_waits else pins,
                len(self._loads) - len(self._parked),
                len(self._parked),
                {**self._counters, **evictions},
            )

    def close(self) -> None:
        """Stop; those who still wait are told "unavailable"."""
        with self._lock:
            self._closed = True
            waiters = [waiter for load in self._loads.values() for waiter in load.waiters]
            for load in self._loads.values():
                load.waiters = []
        self._alarm.close()
        self._upkeep.close()
        self._threads.close()
        self._tell((waiter, LoadFailure("unavailable", "the server is stopping")) for waiter in waiters)

    # Below, methods without a lock of their own are called with it.

    def _at_once(self, artifact_id: str, tokens: int, part: PartFidelity | None) -> Answer | None:
        """The answer that is known already."""
        if self._closed:
            return LoadFailure("unavailable", "the server is stopping")
        load = self._loads.get(resident_key(artifact_id, part))
        if load is not None and load.overdue:
            # Others have stopped waiting for it; whoever comes now would wait in vain as well.
            return LoadFailure("slow_load", f"artifact {artifact_id[:12]} is taking longer than a prefill")
        return self._take(artifact_id, tokens, part)

    def _take(self, artifact_id: str, tokens: int, part: PartFidelity | None) -> Answer | None:
        key = resident_key(artifact_id, part)
        if key in self._gone:
            return LoadFailure("evicted", f"artifact {artifact_id[:12]} is gone from the store")
        bound = self._residents.get(key)
        if bound is None:
            return None
        try:
            prefix: Prefix = bound.first(tokens)
        except InvalidSpec as error:
            return LoadFailure("diverges", error.message)
        self._residents.hold(key)
        self._upkeep.used(artifact_id)
        self._count(hits=1)
        return prefix

    def _prefetch(self, artifact_id: str) -> None:
        if not self._closed and artifact_id not in self._residents and artifact_id not in self._loads:
            self._begin(artifact_id)

    def _begin(self, artifact_id: str, part: PartFidelity | None = None) -> Load:
        load = Load(artifact_id, part)
        self._loads[load.key] = load
        self._submit(load)
        return load

    def _submit(self, load: Load) -> None:
        load.began = None
        load.job = self._threads.submit(lambda: self._run(load))

    def _run(self, load: Load) -> None:
        """On a loader's thread: one load from its header to the answers."""
        with self._lock:
            if self._closed:
                return
            load.began = time.perf_counter()
        bound = failure = None
        try:
            bound = self._loaded(load)
        except NoRoom:
            if self._park(load):
                return
            failure = self._no_room(load)
        except NoPart as error:
            failure = LoadFailure("slow_load", "prefilling is faster than loading all of it", str(error))
        except Exception as error:  # noqa: BLE001 - whatever went wrong, those who wait must hear of it
            failure = failure_of(error, load.artifact_id)
            _log.warning("artifact %s could not be loaded: %s", load.artifact_id[:12], failure.fault)
        self._finish(load, bound, failure)

    def _loaded(self, load: Load) -> BoundPrefix:
        """Read and bind, within the room reserved for it."""
        begin = time.perf_counter()
        load.announced = announced = self._loading.announce(load.artifact_id, load.part)
        self._upkeep.ask([load.artifact_id])
        announced_s = time.perf_counter() - begin  # who waits for the prefix waits for its header, too
        with ExitStack() as stack:
            # Before room is made, which must not cost the calibration that the prefix needs.
            shared = self._resident_calibration(announced, stack)
            with self._lock:
                if not self._residents.reserve(load.key, announced.resident_bytes):
                    raise NoRoom
            if shared is None and announced.calibration is not None:
                shared = self._read_calibration(load, stack)
            return self._bound(load, announced, shared, announced_s)

    def _bound(
        self, load: Load, announced: Announced, shared: Calibration | None, announced_s: float
    ) -> BoundPrefix:
        """Read and bind what there is room for, measure it, and keep it, held once.

        Args:
            announced_s: that announcing it took. Reading its calibration is not counted: the next has it.
        """

        def on_arriving(arriving: Arriving) -> None:
            with self._lock:
                waiters = [waiter for waiter in load.waiters if waiter.tokens == announced.tokens]
            for waiter in waiters:
                if waiter.on_arriving is not None:
                    waiter.on_arriving(arriving)

        begin = time.perf_counter()
        bound = BoundPrefix(self._loading.bind(announced, shared, on_arriving))
        seconds = announced_s + time.perf_counter() - begin
        stored, whole = announced.stored_bytes, announced.artifact_bytes
        held = held_bytes(bound.whole, device=self._model.device, besides=shared)
        needs = None if announced.calibration is None else CALIBRATION + announced.calibration
        with self._lock:
            self.rates.loaded(stored, announced.tokens, seconds, whole_nbytes=whole, noted=load.in_vain)
            load.measured = True
            if not self._residents.put(load.key, bound, held, needs):
                raise MemoryError(f"it holds {held} bytes, more than the {announced.resident_bytes} reserved")
            self._residents.hold(load.key)  # until those who wait have it
            self._count(loads=1, load_seconds=seconds, loaded_bytes=stored)
            if load.part is not None:
                self._count(part_loads=1)
        return bound

    def _resident_calibration(self, announced: Announced, stack: ExitStack) -> Calibration | None:
        """The calibration that an artifact needs, if it is in memory, held until the stack closes."""
        if announced.calibration is None:
            return None
        with self._lock:
            found: Calibration | None = self._residents.get(CALIBRATION + announced.calibration)
            if found is not None:
                self._hold_for(stack, CALIBRATION + announced.calibration)
            return found

    def _read_calibration(self, load: Load, stack: ExitStack) -> Calibration:
        """Read the calibration that an artifact needs, keep it, and hold it until the stack closes."""
        assert load.announced is not None
        found = self._loading.calibration(load.announced)
        name, load.shared_bytes = CALIBRATION + found.id, calibration_bytes(self._model, found)
        with self._lock:
            if name in self._residents:
                found = self._residents.get(name)  # another load was faster
            elif not self._residents.put(name, found, load.shared_bytes, owner=load.key):
                raise NoRoom
            self._hold_for(stack, name)
        return found

    def _hold_for(self, stack: ExitStack, name: str) -> None:
        self._residents.hold(name)
        stack.callback(self.release, name)

    def _no_room(self, load: Load) -> LoadFailure:
        with self._lock:
            failure = no_room(load, self._residents)
        _log.warning("%s", failure.fault)
        return failure

    def _finish(self, load: Load, bound: BoundPrefix | None, failure: LoadFailure | None) -> None:
        answers: list[tuple[Waiter, Answer]] = []
        with self._lock:
            self._forget(load)
            if failure is not None:
                self._residents.cancel(load.key)
                self._count_failure(failure, max(1, len(load.waiters)))
                if failure.lost:
                    self._count(**{_LOST[failure.reason]: 1})
                    self._spoil_parts(load.artifact_id)
            if bound is not None and load.spoiled:
                self._gone |= {load.key}
            for waiter in load.waiters:
                answer = failure or self._take(load.artifact_id, waiter.tokens, load.part)
                assert answer is not None, "a prefix that is held is there"
                answers.append((waiter, answer))
            load.waiters = []
            if load.part is not None and (failure is None or failure.reason == "slow_load"):
                self._prefetch(load.artifact_id)
            if bound is not None:
                self._release(load.key)
            self._unpark()
        self._tell(answers)
        if failure is not None and failure.lost:
            self._tell_lost(load.artifact_id, failure)

    def _forget(self, load: Load) -> None:
        """A load has ended. Its job refers to it, and a cycle would stay until a full garbage collection."""
        self._loads.pop(load.key, None)
        load.job = None

    def _spoil_parts(self, artifact_id: str) -> None:
        """The rest of their file is damaged or missing: they are given to nobody any more."""
        here = self._residents.values
        self._gone |= {key for key in here if is_part(key) and artifact_of(key) == artifact_id}
        for load in self._loads.values():
            load.spoiled |= load.part is not None and load.artifact_id == artifact_id
        self._let_go()

    def _tell_lost(self, artifact_id: str, failure: LoadFailure) -> None:
        """Once, whether anybody waits for the artifact or not."""
        if self._on_lost is None:
            return
        try:
            self._on_lost(artifact_id, failure)
        except Exception:  # noqa: BLE001 - the thread has other loads to do
            _log.exception("artifact %s is %s, and nobody could be told", artifact_id[:12], failure.reason)

    def _park(self, load: Load) -> bool:
        """Let a load wait for room; False where it could never have it, or nobody waits for it."""
        with self._lock:
            self._residents.cancel(load.key)
            if not load.waiters or load.needed_bytes > self._residents.attainable(load.key):
                return False
            self._parked.append(load)
            return True

    def _release(self, key: str) -> None:
        self._residents.release(key)
        self._let_go()
        self._unpark()
        if is_part(key) and key in self._residents and key not in self._residents.holds:
            self._prefetch(artifact_of(key))  # where there was no room beside the part, there may be now

    def _let_go(self) -> None:
        """What is gone from the store, and held no longer, leaves; and so do parts whose whole is there."""
        for key in self._gone.difference(self._residents.holds):
            self._residents.drop(key)
            self._gone -= {key}
            _log.info("artifact %s is gone from the store, and from memory", key[:12])
        for key in self._residents.values.keys() - self._residents.holds.keys():
            if is_part(key) and artifact_of(key) in self._residents:
                self._residents.drop(key)

    def _unpark(self) -> None:
        """Start the loads that have room now."""
        for load in list(self._parked):
            shared = load.announced.calibration if load.announced else None
            there = shared is not None and CALIBRATION + shared in self._residents
            needed = load.needed_bytes - (load.shared_bytes if there else 0)
            if self._residents.reserve(load.key, needed):
                self._parked.remove(load)
                self._submit(load)

    def _expire(self, load: Load, waiter: Waiter, waited_s: float) -> None:
        """On the alarm's thread: a waiter's time of `waited_s` seconds is up."""
        with self._lock:
            if waiter not in load.waiters:
                return
            load.waiters.remove(waiter)
            failure = LoadFailure("slow_load", f"prefilling {waiter.tokens} tokens is faster")
            if load in self._parked:
                failure = self._no_room(load)
                if not load.waiters:
                    self._parked.remove(load)
                    self._forget(load)
            elif load.began is not None and load.job is not None:
                load.overdue = True
                self._threads.give_up(load.job)
                # Where the wait was for a thread, it says nothing of how long loads take.
                unknown = not load.measured and not load.in_vain
                if unknown and time.perf_counter() - load.began > waited_s / 2:
                    load.in_vain = True
                    self.rates.waited_in_vain()
            self._count_failure(failure, 1)
        self._tell([(waiter, failure)])

    def _later_tell(self, waiter: Waiter, answer: Answer) -> None:
        """Tell on a thread of the pool, never on the caller's, which may hold a lock."""

        def tell() -> None:
            self._tell([(waiter, answer)])

        if not self._alarm.after(0, tell):
            threading.Thread(target=tell, daemon=True).start()

    def _tell(self, answers: Iterable[tuple[Waiter, Answer]]) -> None:
        for waiter, answer in answers:
            try:
                waiter.on_done(answer)
            except Exception:  # noqa: BLE001 - the others wait for their answers
                _log.exception("a caller failed when it was told of its prefix")

    def _count(self, **more: float) -> None:
        for name, amount in more.items():
            self._counters[name] += amount

    def _count_failure(self, failure: LoadFailure, requests: int) -> None:
        self._counters[f"failed_{failure.reason}"] += requests

    def _asked(self) -> list[str]:
        """What may be pinned, or gone; what has left is asked about when it comes again."""
        with self._lock:
            keys = [key for key in self._residents.values if not key.startswith(CALIBRATION)]
            here = dict.fromkeys(map(artifact_of, [*keys, *self._loads]))
            for gone in self._residents.pins.difference(here):
                self._residents.unpin(gone)
            return list(here)

    def _learn(self, standings: Mapping[str, Standing]) -> None:
        with self._lock:
            for artifact_id, standing in standings.items():
                (self._residents.pin if standing == "pinned" else self._residents.unpin)(artifact_id)
            gone = {key for key in self._residents.values if standings.get(artifact_of(key)) == "gone"}
            # What was made again is not gone any more. A part may be of the file that was there before.
            self._gone = frozenset(gone) | {key for key in self._gone if is_part(key) or key not in standings}
            self._let_go()
            self._unpark()
