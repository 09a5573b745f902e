"""`EngineSettings`: how much an engine does at once, and how much it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xkv_artifacts.retention import LONGEST_TTL_S
from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer
from xkv_service.selection.spec import SelectionSpec

if TYPE_CHECKING:  # `xkv serve` says what is wrong with its options before torch is imported
    import torch

_PREFILL_TOKENS, _PREFILL_TOKENS_CPU = 2048, 512


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one engine. Defaults: docs/serving.md. How many wait for it is for its user to bound.

    Args:
        max_running: sequences in the batch at once.
        step_tokens: tokens of a prompt computed in one step while others decode: what a stream may stall.
        prefill_tokens: the same while nothing decodes; 0: 512 on a CPU, 2,048 elsewhere.
        tail_bytes: budget of conversations between their turns.
        stored_tail_bytes: of those that had to leave it, in the store, all servers' together; 0: none is
            stored. stored_tail_ttl_s: how long each of them stays there.
        running_bytes: for what requests hold while they run, besides their prefixes; others wait. 0: on a
            GPU what is free when the engine starts, less the other budgets (`RunningMemory`); elsewhere no
            limit.
        rebuilt_bytes: on a GPU, for all keys and values of prefixes that many sequences decode from at once;
            0: tokens are always chosen.
        selection: which tokens of a compressed prefix attention rebuilds.

    Raises:
        InvalidSpec: a limit out of range.
    """

    max_running: int = 16
    step_tokens: int = 128
    prefill_tokens: int = 0
    tail_bytes: int = 2**30
    stored_tail_bytes: int = 4 * 2**30
    stored_tail_ttl_s: float = 3600.0
    running_bytes: int = 0
    rebuilt_bytes: int = 0
    selection: SelectionSpec = field(default_factory=SelectionSpec)

    def __post_init__(self) -> None:
        least = {"max_running": 1, "step_tokens": 1, "prefill_tokens": 0}
        least |= {"tail_bytes": 0, "stored_tail_bytes": 0, "running_bytes": 0, "rebuilt_bytes": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not is_integer(value) or value < low:
                raise InvalidSpec(f"{name}={value!r} is out of range", hint=f"use an integer from {low}")
        if not 0 < self.stored_tail_ttl_s <= LONGEST_TTL_S:
            raise InvalidSpec(
                f"stored_tail_ttl_s={self.stored_tail_ttl_s!r} is out of range",
                hint="use more than 0 s, at most 100 years",
            )

    def on(self, device: torch.device) -> EngineSettings:
        """With what depends on the device settled."""
        by_device = _PREFILL_TOKENS_CPU if device.type == "cpu" else _PREFILL_TOKENS
        return replace(self, prefill_tokens=self.prefill_tokens or by_device)
