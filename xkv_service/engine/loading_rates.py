"""What loading and prefilling cost on this machine now, and so which of the two a prefix gets."""

from __future__ import annotations

import threading
import time
from collections import deque
from math import inf
from statistics import median
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from xkv_service.engine.robust_line import RobustLine

Way = Literal["load", "prefill"]

_START_FIXED_S = 0.02
_START_BYTES_PER_S = 200e6
"""Before anything was loaded: hopeful, since a load that is waited for in vain costs no more than its
deadline, and one that is never tried teaches nothing."""
_ALIKE = 1.1
"""Sizes that differ by less are one."""
_RECENT = 8
"""Loads that say how far loads are from what is believed of them: see benchmarks/load_or_compute.py."""
_IN_VAIN = (1, inf)
"""Bytes and seconds of a load that was waited for in vain, and has not ended."""
_WARM_UPS, _WARM_UP_TOKENS = 4, 128
_LEAST_CHUNK = 32
"""Shorter chunks of a prefill say what a forward costs, not what a token costs."""


class LoadingRates:
    """Moving figures of both ways, robust against odd ones; safe to use from any thread.

    Prefill: seconds per token grow in a straight line with the position. Loading: fixed seconds and seconds
    per byte, from the first byte read to the prefix being bound, and how far from that the last loads were.

    Args:
        seconds_per_token: of a short prefill, to start with.
    """

    def __init__(self, seconds_per_token: float) -> None:
        self._lock = threading.Lock()
        self._prefill = RobustLine([(_WARM_UP_TOKENS / 2, seconds_per_token)])
        ends = (0.0, 64e6)
        self._load = RobustLine([(size, _START_FIXED_S + size / _START_BYTES_PER_S) for size in ends])
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._density: deque[float] = deque(maxlen=32)
        self._sizes: deque[int] = deque(maxlen=32)

    @classmethod
    def measured(cls, model: PreTrainedModel) -> LoadingRates:
        """Rates that start with the least that one of some short prefills takes now.

        On a CPU without the time in which other programs had it: while a server starts, there are many, and
        what they make of a prefill would be how long the first prompts wait for a store.
        """
        ids = torch.ones(1, _WARM_UP_TOKENS, dtype=torch.int64, device=model.device)
        clock = time.thread_time if model.device.type == "cpu" else time.perf_counter
        taken = []
        for _ in range(_WARM_UPS):
            begin = clock()
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.cpu()
            taken.append(clock() - begin)
        return cls(min(taken) / _WARM_UP_TOKENS)

    def prefilled(self, start: int, tokens: int, seconds: float) -> None:
        """Note a chunk of `tokens` tokens, the first at position `start`, that took `seconds`."""
        if tokens >= _LEAST_CHUNK:
            with self._lock:
                self._prefill.observe(start + tokens / 2, seconds / tokens)

    def loaded(
        self,
        nbytes: int,
        tokens: int,
        seconds: float,
        *,
        whole_nbytes: int | None = None,
        overdue: bool = False,
    ) -> None:
        """Note the load of an artifact of `tokens` tokens, `nbytes` of them read, that took `seconds`.

        Args:
            whole_nbytes: of all of the artifact, where a part was loaded.
            overdue: it is one of those that `overdue` was told of.
        """
        with self._lock:
            if overdue and _IN_VAIN in self._recent:
                self._recent.remove(_IN_VAIN)
            self._recent.append((nbytes, seconds))
            self._load.observe(nbytes, seconds)
            self._sizes.append(nbytes)
            self._density.append((whole_nbytes or nbytes) / tokens)

    def overdue(self) -> None:
        """Note a load that was waited for as long as prefilling takes, and goes on."""
        with self._lock:
            self._recent.append(_IN_VAIN)

    def prefill_s(self, tokens: int, start: int = 0) -> float:
        """Seconds that prefilling `tokens` tokens from position `start` on takes."""
        with self._lock:
            return tokens * self._prefill(start + tokens / 2)

    def load_s(self, nbytes: int) -> float:
        """Seconds that reading and binding an artifact of `nbytes` takes."""
        with self._lock:
            return self._load(nbytes)

    def deadline_s(self, tokens: int) -> float:
        """How long a load of `tokens` tokens may be waited for: what prefilling them takes."""
        return self.prefill_s(tokens)

    def decide(self, tokens: int, nbytes: int | None = None) -> Way:
        """The faster way to `tokens` tokens of a stored prefix.

        Args:
            nbytes: of the artifact; by default as many as those loaded before had for so many tokens.

        Returns:
            "load" where nothing was loaded yet: then it is tried.
        """
        with self._lock:
            if not self._recent:
                return "load"
            if nbytes is None:
                nbytes = round(tokens * median(self._density)) if self._density else 0
            return "load" if self._waiting_pays(self._load(nbytes), tokens) else "prefill"

    def part_in_time(self, tokens: int, nbytes: int, whole_nbytes: int) -> bool:
        """Whether `nbytes` of an artifact of `whole_nbytes` are loaded before its tokens are prefilled.

        As long as all loads were of one size, nothing tells what less of it takes. It is hoped to be in
        proportion then, as is right where bytes take the time: the first part's load tells.
        """
        with self._lock:
            alike = not self._sizes or max(self._sizes) <= _ALIKE * min(self._sizes)
            seconds = self._load(whole_nbytes) * nbytes / whole_nbytes if alike else self._load(nbytes)
            return self._waiting_pays(seconds, tokens)

    def _waiting_pays(self, seconds: float, tokens: int) -> bool:
        """Whether waiting for a load that is believed to take so long is expected to be the faster way.

        If it is as far from that as one of the last loads was. Who waits in vain waits as long as prefilling
        takes, and then prefills.
        """
        prefill = tokens * self._prefill(tokens / 2)
        taken = [seconds * actual / self._load(nbytes) for nbytes, actual in self._recent] or [seconds]
        return sum(one if one <= prefill else 2 * prefill for one in taken) <= prefill * len(taken)

    def figures(self) -> dict[str, float]:
        """What both ways are believed to cost now, in seconds: a token of a prefill at position 0 and what
        each position adds to it, a load of no bytes and what each byte adds to it."""
        with self._lock:
            (near, per_position), (fixed, per_byte) = self._prefill.fit, self._load.fit
        return {
            "prefill_token": near,
            "prefill_token_position": per_position,
            "load": fixed,
            "load_byte": per_byte,
        }
