"""What loading and prefilling cost on this machine now, and so which of the two a prefix gets."""

from __future__ import annotations

import threading
import time
from collections import deque
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
_WARM_UP_TOKENS = 128
_LEAST_CHUNK = 32
"""Shorter chunks of a prefill say what a forward costs, not what a token costs."""


class LoadingRates:
    """Moving figures of both ways, robust against odd ones; safe to use from any thread.

    Prefill: seconds per token grow in a straight line with the position. Loading: fixed seconds and seconds
    per byte, from the first byte read to the prefix being bound.

    Args:
        seconds_per_token: of a short prefill, to start with.
    """

    def __init__(self, seconds_per_token: float) -> None:
        self._lock = threading.Lock()
        self._prefill = RobustLine([(_WARM_UP_TOKENS / 2, seconds_per_token)])
        ends = (0.0, 64e6)
        self._load = RobustLine([(size, _START_FIXED_S + size / _START_BYTES_PER_S) for size in ends])
        self._density: deque[float] = deque(maxlen=32)
        self._sizes: deque[int] = deque(maxlen=32)

    @classmethod
    def measured(cls, model: PreTrainedModel) -> LoadingRates:
        """Rates that start with what a short prefill takes now, the second of two."""
        ids = torch.ones(1, _WARM_UP_TOKENS, dtype=torch.int64, device=model.device)
        taken = 0.0
        for _ in range(2):
            begin = time.perf_counter()
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.cpu()
            taken = time.perf_counter() - begin
        return cls(taken / _WARM_UP_TOKENS)

    def prefilled(self, start: int, tokens: int, seconds: float) -> None:
        """Note a chunk of `tokens` tokens, the first at position `start`, that took `seconds`."""
        if tokens >= _LEAST_CHUNK:
            with self._lock:
                self._prefill.observe(start + tokens / 2, seconds / tokens)

    def loaded(self, nbytes: int, tokens: int, seconds: float, *, whole_nbytes: int | None = None) -> None:
        """Note the load of an artifact of `tokens` tokens, `nbytes` of them read, that took `seconds`.

        Args:
            whole_nbytes: of all of the artifact, where a part was loaded.
        """
        with self._lock:
            self._load.observe(nbytes, seconds)
            self._sizes.append(nbytes)
            self._density.append((whole_nbytes or nbytes) / tokens)

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
            if not self._density:
                return "load"
            nbytes = round(tokens * median(self._density)) if nbytes is None else nbytes
        return "load" if self.load_s(nbytes) <= self.prefill_s(tokens) else "prefill"

    def part_in_time(self, tokens: int, nbytes: int, whole_nbytes: int) -> bool:
        """Whether `nbytes` of an artifact of `whole_nbytes` are loaded before its tokens are prefilled.

        As long as all loads were of one size, nothing tells what less of it takes. It is hoped to be in
        proportion then, as is right where bytes take the time: the first part's load tells.
        """
        with self._lock:
            alike = not self._sizes or max(self._sizes) <= _ALIKE * min(self._sizes)
            seconds = self._load(whole_nbytes) * nbytes / whole_nbytes if alike else self._load(nbytes)
        return seconds <= self.deadline_s(tokens)

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
