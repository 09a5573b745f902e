"""`StoredTails`: tails that had to leave an engine's memory, in the store until their conversation goes on.

One thread writes them and others read them: the engine hands over and is called back, and waits for neither.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable

from xkv_artifacts.errors import CatalogUnavailable, ForeignTail, QuotaExceeded, XKVError
from xkv_artifacts.keys import BLOCK_TOKENS
from xkv_artifacts.tail_entry import TailMatch
from xkv_artifacts.tail_shelf import TailShelf
from xkv_service.engine.alarm import Alarm
from xkv_service.engine.breaker import Breaker
from xkv_service.engine.kept_tails import KeptTail
from xkv_service.engine.load_failure import failure_of
from xkv_service.engine.loader_threads import LoaderThreads
from xkv_service.engine.messages import GenerationRequest
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.tail_files import leaving
from xkv_service.engine.tail_rates import TailRates
from xkv_service.engine.tail_search import NoTail, TailSearch, WantedTail
from xkv_service.engine.tail_writer import LeavingTail, TailWriter
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.context import Context

_log = logging.getLogger(__name__)
_THREADS = 2
_QUEUE_BYTES = 256 << 20
"""Memory of tails that wait to be written, on top of that for kept ones, and never more than that."""
_SEARCH_S = 1.0
"""How long a prompt waits for Redis to say whether there is a tail, as it does for its prefix."""
_PAUSE_S = 5.0
"""How long Redis is left alone after it did not say so."""
_CLOSING_S = 10.0
"""How long the end of an engine waits for its tails."""
_HEADER_BYTES = 64 * 1024
"""More than a tail's file has besides its tensors."""

OnTail = Callable[[KeptTail | None], None]


class _Search:
    """One search, and whom it is for. It is over once it was answered or came too late."""

    def __init__(self, wanted: WantedTail, on_done: OnTail) -> None:
        self.wanted, self.on_done = wanted, on_done
        self.found = self.over = False


class StoredTails:
    """Stored tails of one engine's model. `offer` and `request` return at once.

    Args:
        loaded: the model. shelf: where tails are stored. pool: holds the prefixes behind them.
        settings: of the engine.

    Attributes:
        total_bytes: of all stored tails of the store, when this one stored its last.
    """

    def __init__(
        self, loaded: LoadedModel, shelf: TailShelf, pool: PrefixPool, settings: EngineSettings
    ) -> None:
        self._loaded, self._shelf, self._pool, self._settings = loaded, shelf, pool, settings
        self.rates = TailRates(pool.rates)
        self.total_bytes = 0
        self._room: int | None = None
        self._search = TailSearch(loaded, shelf, pool, settings, self.rates)
        self._lock = threading.Lock()
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._late: set[_Search] = set()
        self._writer = TailWriter(self._store, min(settings.tail_bytes, _QUEUE_BYTES))
        self._breaker = Breaker(_PAUSE_S)
        self._searchers = LoaderThreads(_THREADS, _THREADS)
        self._loaders = LoaderThreads(_THREADS, _THREADS)
        self._alarm = Alarm("stored-tail-deadlines")

    def offer(self, tail: KeptTail) -> None:
        """Have a tail stored, if loading it will be faster than computing it again; else it is lost.

        What goes wrong here is counted, and raised.
        """
        try:
            self._offer(tail)
        except Exception:
            self._count(lost_failed=1)
            raise

    def _offer(self, tail: KeptTail) -> None:
        prefix = tail.context.prefix_tokens
        tokens = len(tail.context.ids) - prefix
        if not self.rates.load_is_faster(tail.context.tail_bytes, tokens, prefix, prefix):
            self._count(not_worth=1)
            return
        ready = leaving(tail, self._loaded)
        if self._room is not None:
            self._room -= sum(tensor.nbytes for tensor in ready.tensors.values()) + _HEADER_BYTES
            if self._room < 0:
                self._count(lost_closing=1)
                return
        if not self._writer.put(ready):
            self._count(lost_queue_full=1)

    def request(self, request: GenerationRequest, context: Context, on_done: OnTail) -> bool:
        """Look for a stored tail that holds more of a prompt than a context does, and load it.

        Args:
            on_done: called once, on a thread of this object, with the tail, its prefix held once for the
                caller, or with None: there is none, or computing what it would save has become faster. It
                must be quick.

        Returns:
            False: none can help, or none can be had now; nobody will be called.
        """
        ids = request.token_ids
        held, prefix = len(context.ids), context.prefix_tokens
        rest = len(ids) - 1 - held
        worth = rest > 0 and self.rates.load_is_faster(0, rest, held, prefix)
        if len(ids) <= BLOCK_TOKENS or not worth:
            return False
        with self._lock:
            if self._late:  # others have stopped waiting; whoever comes now would wait in vain as well
                self._counters["failed_slow_load"] += 1
                return False
            if not self._breaker.allows():
                self._counters["failed_unavailable"] += 1
                return False
        search = _Search(WantedTail(request, held, prefix, context.can_crop), on_done)
        seconds = self.rates.compute_s(rest, held, prefix)
        if not self._alarm.after(min(seconds, _SEARCH_S), lambda: self._expire_search(search, seconds)):
            return False
        self._searchers.submit(lambda: self._look(search))
        return True

    def counters(self) -> dict[str, float]:
        """Since the start, by name: see docs/serving.md."""
        with self._lock:
            return dict(self._counters)

    def wait_for_room(self) -> None:
        """The engine ends: for some seconds, `offer` may wait for the writer.

        No more is taken from now on than the store has room for. The most recently used tails come first, and
        by when they were written those that came later would have them go.
        """
        self._room = self._settings.stored_tail_bytes
        self._writer.wait_for_room(_CLOSING_S)

    def close(self) -> None:
        """Stop, after what is in the queue, or after some seconds. Who still waits is not called."""
        self._alarm.close()
        self._searchers.close()
        self._loaders.close()
        self._count(lost_closing=self._writer.close(_CLOSING_S))

    def _store(self, tail: LeavingTail) -> None:
        """On the writer's thread."""
        began = time.perf_counter()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tail.tensors.items()}
        ttl_s, budget = self._settings.stored_tail_ttl_s, self._settings.stored_tail_bytes
        try:
            put = self._shelf.put(tail.manifest, tensors, tail.namespace, ttl_s=ttl_s, budget=budget)
        except QuotaExceeded as error:
            _log.warning("a tail was lost: %s", error.message)
            self._count(lost_too_large=1)
            return
        except XKVError as error:
            _log.warning("a tail was lost: %s", error.message)
            self._count(**{f"lost_{failure_of(error).reason}": 1})
            return
        if put.total is not None:
            self.total_bytes = put.total
        if put.bytes:
            self._count(stored=1, stored_bytes=put.bytes, store_seconds=time.perf_counter() - began)

    def _look(self, search: _Search) -> None:
        """On a searcher's thread: to a match, which a loader's thread reads."""
        if search.over:
            self._answer(search, None)
            return
        try:
            match, until = self._search.find(search.wanted)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the prompt can be computed
            self._heard(search, failed=isinstance(error, CatalogUnavailable))
            self._fail(search, error)
            return
        self._heard(search, failed=False)
        if search.over:
            self._answer(search, None)
            return
        self._alarm.after(until - time.monotonic(), lambda: self._expire(search))
        self._loaders.submit(lambda: self._load(search, match))

    def _heard(self, search: _Search, *, failed: bool) -> None:
        """Redis said whether there is a tail, in time or late, or failed to."""
        with self._lock:
            search.found = not search.over
            if failed:
                self._breaker.failed()
            elif search.over:
                self._breaker.answered_late()
            else:
                self._breaker.succeeded()

    def _load(self, search: _Search, match: TailMatch) -> None:
        """On a loader's thread: from a match to the answer."""
        try:
            tail = None if search.over else self._search.load(search.wanted, match)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(search, error)
            return
        if tail is not None:
            seconds = time.monotonic() - search.wanted.began
            self.rates.loaded(match.entry.bytes, seconds)
            self._count(loaded=1, loaded_bytes=match.entry.bytes, load_seconds=seconds)
        self._answer(search, tail)

    def _fail(self, search: _Search, error: Exception) -> None:
        if isinstance(error, NoTail):
            self._count_failure(str(error))
        else:
            failure = failure_of(error)
            _log.warning("no stored tail: %s", failure.fault)
            self._count_failure("foreign" if isinstance(error, ForeignTail) else failure.reason)
        self._answer(search, None)

    def _answer(self, search: _Search, tail: KeptTail | None) -> None:
        with self._lock:
            self._late.discard(search)
            late, search.over = search.over, True
        if not late:
            search.on_done(tail)
        elif tail is not None and tail.artifact_id is not None:
            self._pool.release(tail.artifact_id)

    def _expire_search(self, search: _Search, seconds: float) -> None:
        """On the alarm's thread: Redis was to answer by now, or computing, of so many seconds, is done."""
        with self._lock:
            if search.found or search.over:
                return
            hangs = seconds >= _SEARCH_S
            if hangs:
                self._breaker.failed()
        self._expire(search, "unavailable" if hangs else "slow_load")

    def _expire(self, search: _Search, reason: str = "slow_load") -> None:
        """On the alarm's thread: the prompt is computed."""
        with self._lock:
            if search.over:
                return
            search.over = True
            self._late.add(search)
            self._counters[f"failed_{reason}"] += 1
        search.on_done(None)

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, amount in more.items():
                self._counters[name] += amount

    def _count_failure(self, reason: str) -> None:
        self._count(**{"none" if reason == "none" else f"failed_{reason}": 1})
