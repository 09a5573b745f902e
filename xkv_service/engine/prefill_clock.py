"""`PrefillClock`: how long a prefill takes, beside loads or not."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

_KEPT = 32


class PrefillClock:
    """Times prefills, one after the other, on one thread.

    On a CPU, loads of prefixes run on the same cores: as long as they make a prefill look, the next prompts
    would wait for theirs, and what is not computed is not timed again. So beside loads the thread's own time
    on a processor counts, times what else took the cores from the last prefills without loads: other
    programs, or a limit.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._others: deque[float] = deque(maxlen=_KEPT)
        self.begin()

    def begin(self) -> None:
        """A prefill begins."""
        self._began, self._own = time.perf_counter(), time.thread_time()

    def seconds(self, *, beside_loads: bool) -> float:
        """What the prefill took; a GPU is waited for."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        took, own = time.perf_counter() - self._began, time.thread_time() - self._own
        if self._device.type != "cpu":
            return took
        if beside_loads:
            return own * (median(self._others) if self._others else 1.0)
        if own > 0:
            self._others.append(took / own)
        return took
