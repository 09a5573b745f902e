"""Counts right answers on the device; nothing is read back until somebody asks."""

import torch
from torch.nn import functional

from demo_training.batches import KINDS

Tensor = torch.Tensor


def right_answers(right: Tensor, answers: Tensor, kinds: Tensor) -> Tensor:
    """Return which answers are right in every token: bool [rows, answers].

    Args:
        right: [rows, tokens] whether the token after each position was predicted.
        answers: [rows, tokens] number of the answer each token belongs to, 0 for none.
        kinds: [rows, answers] index of each answer's kind, -1 where there is none.
    """
    said = functional.pad(answers[:, 1:].long(), (0, 1))
    wrong = torch.zeros(kinds.shape[0], kinds.shape[1] + 1, device=right.device)
    wrong.scatter_add_(1, said, (~right).float())
    return (wrong[:, 1:] == 0) & (kinds >= 0)


class Scores:
    """Sums answers asked and answered by kind, and tokens of answers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._asked = torch.zeros(len(KINDS) + 1, device=self.device)
        self._right = torch.zeros_like(self._asked)
        self._tokens = torch.zeros(2, device=self.device)

    def add(self, right: Tensor, answers: Tensor, kinds: Tensor) -> None:
        """Count one batch; arguments as for ``right_answers``."""
        index = kinds.long().flatten() + 1
        good = right_answers(right, answers, kinds).float().flatten()
        self._asked.scatter_add_(0, index, torch.ones_like(good))
        self._right.scatter_add_(0, index, good)
        said = functional.pad(answers[:, 1:], (0, 1)) > 0
        self._tokens += torch.stack([(right & said).sum(), said.sum()])

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Return for each kind that was asked: how often, and the share of right answers."""
        asked, right = self._asked.tolist()[1:], self._right.tolist()[1:]
        return {k: (int(n), r / n) for k, n, r in zip(KINDS, asked, right, strict=True) if n}

    def token_accuracy(self) -> float:
        """Return the share of right tokens in answers."""
        right, said = self._tokens.tolist()
        return float(right / max(said, 1.0))
