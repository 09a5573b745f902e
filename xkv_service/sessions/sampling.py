"""Choose the next token from logits."""

from __future__ import annotations

import torch

from xkv_service.sessions.settings import GenerationSettings


class Sampler:
    """Chooses tokens as settings say; with a seed, the same ones for the same logits."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self._generator = torch.Generator()
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)
        else:
            self._generator.seed()

    def __call__(self, logits: torch.Tensor) -> int:
        """A token for logits [vocabulary].

        Raises:
            ArithmeticError: they are not numbers.
        """
        if bool(logits.isnan().any()):
            raise ArithmeticError("the model's logits are not numbers")
        if self._settings.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        scaled = (logits - logits.max()) / self._settings.temperature  # beyond any float: the likeliest alone
        likely = _nucleus(scaled.softmax(-1), self._settings.top_p)
        return int(torch.multinomial(likely, 1, generator=self._generator))


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero for all but the fewest tokens that together have `top_p`."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p] = 0.0
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)
