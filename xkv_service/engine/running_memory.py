"""`RunningMemory`: which request begins next, so that what runs fits into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from transformers import PreTrainedModel

from xkv_service.decoding.growing_layer import GROWTH
from xkv_service.engine.sequence import Sequence
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.inspect import inspect_loaded

_FOR_STEPS = 0.1
"""Of a GPU's memory, what forwards and graphs need. At least as much may run."""


class RunningMemory:
    """What requests hold while they run, under a budget: exact keys and values of all their tokens, but for
    those of a compressed prefix. Windows and states, which do not grow, do not count. Not thread-safe.

    Args:
        budget: bytes. token_bytes: that a token takes, room made ahead included.
        question: with no more tokens than this behind its prefix a prompt waits for nobody.

    Attributes:
        nbytes: expected of what ran when a request was last looked for.
    """

    def __init__(self, budget: float, token_bytes: float, question: int) -> None:
        self._budget, self._token_bytes, self._question = budget, token_bytes, question
        self.nbytes = 0

    @classmethod
    def of(cls, model: PreTrainedModel, settings: EngineSettings, others: int) -> RunningMemory:
        """For an engine whose model is loaded, and nothing else.

        Args:
            others: bytes that the model's device must have besides, for prefixes and other processes.
        """
        layers = inspect_loaded(model).layout.compressible
        width = sum(layer.key_width + layer.value_width for layer in layers)
        others += settings.tail_bytes + settings.rebuilt_bytes
        budget = settings.running_bytes or _free(model.device, others)
        return cls(budget, GROWTH * width * int(model.dtype.itemsize), settings.step_tokens)

    def next(self, waiting: Iterable[Sequence], begun: Collection[Sequence]) -> Sequence | None:
        """The first that waits, if it fits beside what has begun; where it does not, the first question.

        One that does not fit beside nothing begins where no other prompt but questions has begun.
        """
        self.nbytes = int(sum(map(self._bytes, begun)))
        alone = all(map(self._is_question, begun))
        left = float("inf") if alone else self._budget - self.nbytes
        for sequence in waiting:
            if self._is_question(sequence) or self._bytes(sequence) <= left:
                return sequence
            left = 0  # whoever came later waits, too
        return None

    def holds(self, tokens: int, begun: Iterable[Sequence]) -> bool:
        """Whether so many tokens fit beside what has begun."""
        return tokens * self._token_bytes + sum(map(self._bytes, begun)) <= self._budget

    def _is_question(self, sequence: Sequence) -> bool:
        return self._tokens(sequence) - sequence.answered <= self._question

    def _bytes(self, sequence: Sequence) -> float:
        return self._token_bytes * self._tokens(sequence)

    def _tokens(self, sequence: Sequence) -> int:
        """How many it holds exactly, or will when its prompt is computed."""
        context, match, tokens = sequence.context, sequence.request.match, len(sequence.request.token_ids)
        if context is not None:
            prefix = context.prefix_tokens
        else:
            prefix = match.tokens if match is not None and not sequence.whole else 0
        return tokens - prefix + sequence.answered


def _free(device: torch.device, others: int) -> float:
    """Bytes that are free on a GPU now and that nothing else has a budget of; elsewhere there is no limit."""
    if device.type != "cuda":
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free - others - _FOR_STEPS * total, _FOR_STEPS * total)
