"""Choose the next token from logits, for many sequences at once, where the logits are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.sessions.settings import GenerationSettings

_NOT_NUMBERS = -1


class Sampler:
    """Chooses tokens as settings say; with a seed, the same ones for the same logits, whoever is beside."""

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self._generator = torch.Generator()
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)
        else:
            self._generator.seed()

    def draw(self) -> float:
        """The next number of [0, 1): one for each token."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def __call__(self, logits: torch.Tensor) -> int:
        """A token for logits [vocabulary].

        Raises:
            ArithmeticError: they are not numbers.
        """
        return check_chosen(choose([self], logits[None])[0])


def choose(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[int]:
    """A token for each row of logits [sequences, vocabulary]; below zero where they are not numbers.

    The device is waited for once.
    """
    found = logits.argmax(-1)
    drawing = [place for place, one in enumerate(samplers) if one.settings.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing).to(logits.device, non_blocking=True)
        found[rows] = _drawn([samplers[place] for place in drawing], logits[rows])
    tokens: list[int] = found.masked_fill(logits.isnan().any(-1), _NOT_NUMBERS).tolist()
    return tokens


def check_chosen(token: int) -> int:
    """The token.

    Raises:
        ArithmeticError: there is none, since logits were not numbers.
    """
    if token == _NOT_NUMBERS:
        raise ArithmeticError("the model's logits are not numbers")
    return token


def _drawn(samplers: Sequence[Sampler], logits: torch.Tensor) -> torch.Tensor:
    """int64 [sequences]: of the fewest tokens that together have `top_p`, by their shares."""
    settings = [one.settings for one in samplers]
    numbers = [
        [one.temperature, one.top_p, draw.draw()] for one, draw in zip(settings, samplers, strict=True)
    ]
    given = torch.tensor(numbers, dtype=torch.float64).to(logits.device, non_blocking=True)
    temperature, top_p, draws = given[:, :1], given[:, 1:2], given[:, 2:]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    # Beyond any float at a tiny temperature: the likeliest alone.
    weights = ((ordered.double() - ordered[:, :1]) / temperature).exp()
    ends = weights.cumsum(-1)
    kept = ends - weights < top_p * ends[:, -1:]
    most = torch.where(kept, ends, 0.0).amax(-1, keepdim=True)
    place = torch.searchsorted(ends, draws * most, right=True)
    return order.gather(1, torch.minimum(place, kept.sum(-1, keepdim=True) - 1).clamp_(0))[:, 0]
