"""`HeadStarts`: the first forward behind a prefix, begun while the prefix is still being read.

It runs on a thread of its own and waits at each layer for its factors, so that nobody else waits with it.
What comes of it is told together with the outcome of the load, never before: every byte has been checked
then. Where the load fails, or the forward does, the request goes on as if there had been none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from xkv_service.decoding.arriving import Arriving, ArrivingCache, NotArriving
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.selection.spec import SelectionSpec
from xkv_service.sessions.context import Context

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ran:
    """What a head start brought.

    Args:
        context: holds the prefix and the tokens that were run. tokens: how many those are.
        logits: behind the last of them: float32 [vocabulary].
    """

    context: Context
    tokens: int
    logits: torch.Tensor


OnEnd = Callable[[Prefix | LoadFailure, Ran | None], None]


class HeadStarts:
    """Head starts of one model, one at a time: others wait for their prefixes as if there were none.

    Args:
        model: inside `enable_xkv` as long as they run. selection: of the caches.
    """

    def __init__(self, model: PreTrainedModel, selection: SelectionSpec) -> None:
        self.model, self.selection = model, selection
        self.turn = threading.Lock()

    def request(
        self, prefixes: PrefixPool, match: PrefixMatch, ids: Sequence[int], on_end: OnEnd
    ) -> HeadStart:
        """Have a prefix loaded, with a head start of the tokens behind it. As `of`."""
        start = self.of(ids, on_end)
        prefixes.request(match.artifact_id, match.tokens, start.loaded, on_arriving=start.begin)
        return start

    def of(self, ids: Sequence[int], on_end: OnEnd) -> HeadStart:
        """A head start of the tokens behind a prefix.

        Args:
            on_end: called once, on some thread, when the load has ended.
        """
        return HeadStart(self, ids, on_end)


class HeadStart:
    """One request's, from the moment that it asks for its prefix.

    Attributes:
        begun: whether its forward has.
    """

    def __init__(self, starts: HeadStarts, ids: Sequence[int], on_end: OnEnd) -> None:
        self._starts, self._ids, self._on_end = starts, list(ids), on_end
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._arriving: Arriving | None = None
        self.begun = self._running = self._answered = False
        self._prefix: Prefix | None = None  # loaded, and not told yet
        self._ran: Ran | None = None

    def begin(self, arriving: Arriving) -> None:
        """The prefix's layers are about to come: start, unless another one runs."""
        with self._lock:
            wanted = not self._answered and not self._stopped.is_set()
            if not wanted or not self._starts.turn.acquire(blocking=False):
                return
            self._arriving, self.begun, self._running = arriving, True, True
        try:
            threading.Thread(target=self._run, args=(arriving,), name="head-start", daemon=True).start()
        except RuntimeError:  # no more threads
            self._ended(None)

    def loaded(self, answer: Prefix | LoadFailure) -> None:
        """The load has ended. What is told of it waits for the forward, if one runs that is of use."""
        with self._lock:
            self._answered = True
            if self._running and isinstance(answer, Prefix):
                self._prefix = answer
                return
            ran, self._ran = self._ran, None
        self.stop()
        self._tell(answer, ran)

    def stop(self) -> None:
        """Nobody wants it any more: the forward ends at its next layer."""
        self._stopped.set()
        arriving = self._arriving
        if arriving is not None:
            arriving.wake()

    def _run(self, arriving: Arriving) -> None:
        ran = None
        try:
            ran = self._forward(arriving)
        except NotArriving:
            pass
        except Exception:  # noqa: BLE001 - the engine runs the tokens again, and tells what is wrong with them
            _log.warning("a forward beside a load failed", exc_info=True)
        finally:
            self._ended(ran)

    def _ended(self, ran: Ran | None) -> None:
        self._starts.turn.release()
        with self._lock:
            prefix, self._prefix = self._prefix, None
            self._running, self._ran = False, ran if not self._answered else None
        if prefix is not None:
            self._tell(prefix, ran)

    def _tell(self, answer: Prefix | LoadFailure, ran: Ran | None) -> None:
        """Told once; nothing of the prefix is kept here any longer."""
        self._arriving = None
        useful = ran is not None and ran.context.cache.prefix is answer
        self._on_end(answer, ran if useful else None)

    @torch.no_grad()
    def _forward(self, arriving: Arriving) -> Ran:
        model, selection, prefix = self._starts.model, self._starts.selection, arriving.prefix
        cache = ArrivingCache(arriving, selection, self._stopped)
        context = Context(model, cache, prefix.token_ids.tolist())
        logits = context.advance(self._ids)
        ids = context.ids
        settled = Context(model, XKVCache(prefix, selection), ids[: prefix.tokens])
        settled.cache, settled.ids = cache.settled(), ids
        return Ran(settled, len(self._ids), logits)
