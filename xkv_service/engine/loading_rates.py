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
BELIEVED_S = 300.0
"""How long they say so; then the line is believed alone. A guess."""
_IN_VAIN = (1, inf)
"""Bytes and seconds of a load that was waited for in vain, and has not been measured."""
_WARM_UPS, _WARM_UP_TOKENS, _WARM_UP_TOKENS_GPU = 4, 128, 2048
"""A GPU takes for 128 tokens what it takes to launch them."""
LEAST_CHUNK = 32
"""Shorter chunks of a prefill say what a forward costs, not what a token costs."""
_LEAST_REST = 128
"""As short behind factors, where a forward costs more; and shorter rests are questions."""
_WORTH = 1.5
"""By how much computing everything must be faster than what a prompt has behind a prefix: it holds an exact
cache of all of it from then on. A guess."""


class LoadingRates:
    """Moving figures of both ways, robust against odd ones; safe to use from any thread.

    Prefill: seconds per token grow in a straight line with the position, and in another one with the distance
    behind a prefix in factors. Loading: fixed seconds and seconds per byte, from the first byte read to the
    prefix being bound, and how far from that the last loads were.

    Args:
        seconds_per_token: of a short prefill, to start with. position: of its middle.
    """

    def __init__(self, seconds_per_token: float, position: float = _WARM_UP_TOKENS / 2) -> None:
        self._lock = threading.Lock()
        self._prefill = RobustLine([(position, seconds_per_token)])
        ends = (0.0, 64e6)
        self._load = RobustLine([(size, _START_FIXED_S + size / _START_BYTES_PER_S) for size in ends])
        self._recent: deque[tuple[float, tuple[int, float]]] = deque(maxlen=_RECENT)
        self._behind: dict[int, tuple[float, RobustLine]] = {}
        self._density: deque[float] = deque(maxlen=32)
        self._sizes: deque[int] = deque(maxlen=32)

    @classmethod
    def measured(cls, model: PreTrainedModel) -> LoadingRates:
        """Rates that start with the least that one of some short prefills takes now.

        On a CPU without the time in which other programs had it: while a server starts, there are many.
        """
        on_cpu = model.device.type == "cpu"
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _WARM_UP_TOKENS
        tokens = _WARM_UP_TOKENS if on_cpu else min(_WARM_UP_TOKENS_GPU, most)
        ids = torch.ones(1, tokens, dtype=torch.int64, device=model.device)
        clock = time.thread_time if on_cpu else time.perf_counter
        taken = []
        for _ in range(_WARM_UPS):
            begin = clock()
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.cpu()
            taken.append(clock() - begin)
        return cls(min(taken) / tokens, tokens / 2)

    def prefilled(self, start: int, tokens: int, seconds: float, prefix: int = 0) -> None:
        """Note a chunk of `tokens` tokens, the first at position `start`, that took `seconds`.

        Args:
            prefix: tokens in factors that stand before it. Behind these each token costs more, the more stand
                between it and them.
        """
        if tokens < (_LEAST_REST if prefix else LEAST_CHUNK):
            return
        with self._lock:
            if not prefix:
                self._prefill.observe(start + tokens / 2, seconds / tokens)
                return
            line = self._behind_lately(prefix) or RobustLine([(0.0, self._prefill(0.0))])
            line.observe(start - prefix + tokens / 2, seconds / tokens)
            self._behind[prefix.bit_length()] = time.monotonic(), line

    def loaded(
        self,
        nbytes: int,
        tokens: int,
        seconds: float,
        *,
        whole_nbytes: int | None = None,
        noted: bool = False,
    ) -> None:
        """Note the load of an artifact of `tokens` tokens, `nbytes` of them read, that took `seconds`.

        Args:
            whole_nbytes: of all of the artifact, where a part was loaded.
            noted: it is one of those that `waited_in_vain` was told of, and counts once.
        """
        with self._lock:
            if noted:
                vain = next((one for one in self._recent if one[1] == _IN_VAIN), None)
                if vain is not None:
                    self._recent.remove(vain)
            self._recent.append((time.monotonic(), (nbytes, seconds)))
            self._load.observe(nbytes, seconds)
            self._sizes.append(nbytes)
            self._density.append((whole_nbytes or nbytes) / tokens)

    def waited_in_vain(self) -> None:
        """Note a load that was waited for as long as prefilling takes, and goes on."""
        with self._lock:
            self._recent.append((time.monotonic(), _IN_VAIN))

    def prefill_s(self, tokens: int, start: int = 0, prefix: int = 0) -> float:
        """Seconds that prefilling `tokens` tokens from position `start` on takes.

        Args:
            prefix: tokens in factors that stand before them. As without, where nothing was prefilled behind a
                prefix of about that length.
        """
        with self._lock:
            _, line = self._behind.get(prefix.bit_length(), (-inf, None))
            if line is None:
                return tokens * self._prefill(start + tokens / 2)
            return tokens * line(start - prefix + tokens / 2)

    def load_s(self, nbytes: int) -> float:
        """Seconds that reading and binding an artifact of `nbytes` takes."""
        with self._lock:
            return self._load(nbytes)

    def deadline_s(self, tokens: int) -> float:
        """How long a load of `tokens` tokens may be waited for: what prefilling them takes."""
        return self.prefill_s(tokens)

    def decide(self, tokens: int, nbytes: int | None = None, rounds: int = 1) -> Way:
        """The faster way to `tokens` tokens of a stored prefix.

        Args:
            nbytes: of the artifact; by default as many as those loaded before had for so many tokens.
            rounds: of loads until it is there, its own included: more than one where others are before it.

        Returns:
            "load" where nothing was loaded yet: then it is tried.
        """
        with self._lock:
            if not self._density and not self._outcomes():
                return "load"
            if nbytes is None:
                nbytes = round(tokens * median(self._density)) if self._density else 0
            return "load" if self._waiting_pays(rounds * self._load(nbytes), tokens) else "prefill"

    def part_in_time(self, tokens: int, nbytes: int, whole_nbytes: int) -> bool:
        """Whether waiting for `nbytes` of an artifact of `whole_nbytes` is expected to be faster than
        prefilling its tokens.

        As long as all loads were of one size, nothing tells what less of it takes. It is hoped to be in
        proportion then, as is right where bytes take the time: the first part's load tells.
        """
        with self._lock:
            alike = not self._sizes or max(self._sizes) <= _ALIKE * min(self._sizes)
            seconds = self._load(whole_nbytes) * nbytes / whole_nbytes if alike else self._load(nbytes)
            return self._waiting_pays(seconds, tokens)

    def everything_is_faster(self, prefix: int, tokens: int, held: int) -> bool:
        """Whether computing all `tokens` tokens of a prompt takes at most two thirds as long as those behind
        the `held` ones that a prefix of `prefix` tokens and what is kept behind it have.

        Returns:
            False where so few are left that they are a question, and where nothing like them was computed
            lately, behind a prefix of about that length: what is not used is measured no more.
        """
        with self._lock:
            unknown = self._behind_lately(prefix) is None
        if unknown or tokens - held < _LEAST_REST:
            return False
        return _WORTH * self.prefill_s(tokens) <= self.prefill_s(tokens - held, held, prefix)

    def _behind_lately(self, prefix: int) -> RobustLine | None:
        """Seconds a token, over the distance behind prefixes of about that length. Called with the lock."""
        at, line = self._behind.get(prefix.bit_length(), (-inf, None))
        return line if at >= time.monotonic() - BELIEVED_S else None

    def _outcomes(self) -> list[float]:
        """Of the last loads, seconds as a multiple of what is believed of them now. Called with the lock."""
        since = time.monotonic() - BELIEVED_S
        return [seconds / self._load(nbytes) for noted, (nbytes, seconds) in self._recent if noted >= since]

    def _waiting_pays(self, seconds: float, tokens: int) -> bool:
        """Whether waiting for a load that is believed to take so long is expected to be faster than
        prefilling `tokens` tokens. Called with the lock.

        Each of the last loads says one outcome: it takes as many times longer than believed. Who waits in
        vain waits as long as prefilling takes, and then prefills.
        """
        prefill = tokens * self._prefill(tokens / 2)
        waits = [seconds * outcome for outcome in self._outcomes()] or [seconds]
        return sum(one if one <= prefill else 2 * prefill for one in waits) <= prefill * len(waits)

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
