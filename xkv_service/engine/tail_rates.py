"""What loading a stored tail and computing it again cost now, and so which of the two it gets."""

from __future__ import annotations

import threading
import time
from math import inf

from xkv_service.engine.loading_rates import BELIEVED_S, LoadingRates
from xkv_service.engine.robust_line import RobustLine

_START_FIXED_S = 0.02
_START_BYTES_PER_S = 200e6
"""Before anything was loaded: hopeful, as for prefixes. A load that is waited for in vain costs no more than
computing would, and one that is never tried teaches nothing."""


class TailRates:
    """What loading tails takes, learned here, and computing, asked for; safe to use from any thread.

    Args:
        prefill: what computing costs.
    """

    def __init__(self, prefill: LoadingRates) -> None:
        self._prefill, self._lock = prefill, threading.Lock()
        ends = (0.0, 64e6)
        self._load = RobustLine([(size, _START_FIXED_S + size / _START_BYTES_PER_S) for size in ends])
        self._loaded_at = -inf

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Note a load of so many bytes, from the question for it to a context that can go on."""
        with self._lock:
            self._load.observe(nbytes, seconds)
            self._loaded_at = time.monotonic()

    def load_s(self, nbytes: int) -> float:
        """Seconds that such a load takes. Where none was seen for a while, it is hoped again that it takes
        little: what is believed to be slow is not loaded, and would never be seen to have become quick.
        """
        with self._lock:
            if time.monotonic() - self._loaded_at > BELIEVED_S:
                return _START_FIXED_S + nbytes / _START_BYTES_PER_S
            return self._load(nbytes)

    def compute_s(self, tokens: int, start: int, prefix: int) -> float:
        """Seconds that computing `tokens` tokens from position `start` on takes, and so the longest that a
        load of them is waited for.

        Args:
            prefix: tokens in factors that stand before them.
        """
        return self._prefill.prefill_s(tokens, start, prefix)

    def load_is_faster(self, nbytes: int, tokens: int, start: int, prefix: int) -> bool:
        """Whether loading so many bytes takes no longer than computing the tokens that they hold."""
        return self.load_s(nbytes) <= self.compute_s(tokens, start, prefix)
