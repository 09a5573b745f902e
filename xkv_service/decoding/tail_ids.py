"""The tokens of a tail as they were given, to hold the ids of a later call against."""

from __future__ import annotations

import torch

_UNKNOWN = -1


class TailIds:
    """Never changed, so that forks share it. Tokens given as embeddings, or not at all, are unknown.

    Args:
        ids: int64 [rows, n], -1 where unknown. More than the tail has are forgotten tokens.
    """

    def __init__(self, ids: torch.Tensor | None = None) -> None:
        self._ids = torch.empty(1, 0, dtype=torch.int64) if ids is None else ids

    def extended(self, held: int, given: torch.Tensor) -> TailIds:
        """Behind the first `held` tokens stand `given`: ids [rows, t], or their embeddings [rows, t, D]."""
        new = given if given.ndim == 2 else torch.full(given.shape[:2], _UNKNOWN, device=given.device)
        return TailIds(torch.cat([self._known(held, len(given)).to(given.device), new], 1))

    def rows(self, places: torch.Tensor) -> TailIds:
        """Those of other rows of the batch."""
        return TailIds(self._ids[places.to(self._ids.device)])

    def repeated(self, times: int) -> TailIds:
        """Each row several times."""
        return TailIds(self._ids.repeat_interleave(times, 0))

    def departure(self, ids: torch.Tensor) -> int | None:
        """Place of the first token in which ids [rows, n] differ from the tail of n tokens, or None."""
        rows = max(len(self._ids), len(ids))
        known = self._known(ids.shape[1], rows).to(ids.device)
        given = ids.repeat_interleave(rows // len(ids), 0)
        if len(given) != rows:
            return None
        wrong = ((known != given) & (known != _UNKNOWN)).any(0)
        return int(wrong.int().argmax()) if bool(wrong.any()) else None

    def _known(self, count: int, rows: int) -> torch.Tensor:
        """[rows, count], as far as known."""
        known = self._ids[:, :count]
        if len(known) not in (1, rows):
            known = known[:1, :0]
        lacking = known.new_full((len(known), count - known.shape[1]), _UNKNOWN)
        return torch.cat([known, lacking], 1).expand(rows, -1)
