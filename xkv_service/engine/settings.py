"""`EngineSettings`: how much an engine does at once, and how much it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer
from xkv_service.selection.spec import SelectionSpec


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one engine. Defaults: docs/serving.md.

    Args:
        max_running: sequences in the batch at once.
        max_waiting: requests that may wait for a place; more are refused as overloaded.
        step_tokens: tokens of a prompt computed in one step while others decode: what a stream may stall.
        prefill_tokens: tokens of a prompt computed in one step while nothing decodes.
        tail_bytes: budget of conversations between their turns.
        selection: which tokens of a compressed prefix attention rebuilds.

    Raises:
        InvalidSpec: a limit out of range.
    """

    max_running: int = 16
    max_waiting: int = 256
    step_tokens: int = 128
    prefill_tokens: int = 2048
    tail_bytes: int = 2**30
    selection: SelectionSpec = field(default_factory=SelectionSpec)

    def __post_init__(self) -> None:
        least = {"max_running": 1, "max_waiting": 0, "step_tokens": 1, "prefill_tokens": 1, "tail_bytes": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not is_integer(value) or value < low:
                raise InvalidSpec(f"{name}={value!r} is out of range", hint=f"use an integer from {low}")
