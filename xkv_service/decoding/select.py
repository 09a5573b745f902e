"""Choose the tokens of a prefix that each query token attends to (paper, section 3.3).

The score of a token is the largest share of any head's attention that its index promises it. The share is
counted over everything the head sees, the exact tokens and the tail included: a head that looks at the tail
claims nothing of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from xkv_service.decoding.layer_prefix import ReadablePrefix
from xkv_service.decoding.scoring import JoinedSketches, LandmarkScorer, Scorer, Scoring, SketchScorer
from xkv_service.errors import CacheMisuse, InvalidSpec
from xkv_service.selection.spec import SelectionSpec

_KINDS: dict[str, tuple[type[Scorer], ...]] = {
    "sketch": (SketchScorer, JoinedSketches),
    "landmark": (LandmarkScorer,),
}
_ENDS: WeakKeyDictionary[ReadablePrefix, dict[tuple[int, int], _Ends]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Selected:
    """Tokens of a prefix to attend to, besides the exact ones.

    Args:
        positions: int64 [u], ascending: every token that some query token chose.
        member: bool [batch, 1 or kv_heads, t, u], who chose what; None: everybody chose all of them.
    """

    positions: torch.Tensor
    member: torch.Tensor | None = None


class Choosing(Protocol):
    """What attention asks for the tokens of a prefix, once for each piece of its queries."""

    prefix: ReadablePrefix

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """As `Selection`."""


class Selection:
    """The selection of one layer.

    Args:
        prefix: the layer's prefix. spec: how to choose.
        reuses: whether the layer takes what the one before it chose: it cannot choose by itself then.

    Attributes:
        scorer: the index that chooses, or None. dense: whether every token is attended to.
        unit: tokens that are chosen together, those of a landmark.
        budget: tokens to choose, of whole units: one is paid for whole, whatever of it is exact or rebuilt
            always. choosable: tokens to choose from.
        always: int64, positions that are rebuilt for every query besides.
    """

    def __init__(self, prefix: ReadablePrefix, spec: SelectionSpec, *, reuses: bool = False) -> None:
        self.prefix, self.spec = prefix, spec
        self.reuses = reuses
        self.scorer = self._choose_scorer()
        self.unit = self.scorer.unit if self.scorer else 1
        self._ends = self._ends_of_prefix()
        self.always = self._ends.positions
        asked = spec.tokens(prefix.tokens)
        self.budget = max(1, asked // self.unit) * self.unit
        self.choosable = len(prefix.positions) - len(self.always)
        self.dense = self.scorer is None or asked >= self.choosable

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """Choose for rotated queries.

        Args:
            queries: [batch, kv_heads, heads of a group, t, D].
            others: float32 [batch, kv_heads, heads of a group, t], the log of the sum of exponentials of the
                scores of all that is attended to besides the prefix's factors.
            scoring: what makes scores of products.
        """
        if self.reuses:
            raise CacheMisuse(
                "this layer has no selection index: it attends to what the layer before it chose",
                hint="pass attention `Repeated` choices, as `PrefixLayer.attend` does",
            )
        if self.dense:
            return Selected(self.prefix.positions)
        assert self.scorer is not None
        batch, heads, group, count, dim = queries.shape
        rows = queries.transpose(0, 1).reshape(heads, batch * group * count, dim)
        scores = scoring(self.scorer(rows)).reshape(heads, batch, group, count, -1).transpose(0, 1)
        total = torch.logaddexp(scores.logsumexp(-1), others)
        scores -= total[..., None]
        shares = scores.amax(2)  # one dimension at a time: over two at once it is 30 times slower on a CPU
        shares = shares.amax(1, keepdim=True) if self.spec.granularity == "layer" else shares
        return self._best(shares)

    def _best(self, shares: torch.Tensor) -> Selected:
        """The best tokens of `shares` [batch, 1 or kv_heads, t, units]."""
        if self.unit == 1:
            shares.masked_fill_(self._ends.closed, -torch.inf)
        best = shares.topk(min(self.budget // self.unit, shares.shape[-1]), dim=-1).indices
        if shares.shape[:3].numel() == 1:
            return Selected(self._with_always(self._tokens_of(best.flatten())))
        member = torch.zeros(shares.shape, dtype=torch.bool, device=shares.device).scatter_(-1, best, True)
        if self.unit > 1:
            member = member.repeat_interleave(self.unit, -1)[..., : self.prefix.tokens]
        member.masked_fill_(self._ends.closed, False)
        member[..., self.always] = True
        positions = member.flatten(0, 2).any(0).nonzero()[:, 0]
        return Selected(positions, member[..., positions])

    def _tokens_of(self, best: torch.Tensor) -> torch.Tensor:
        """Tokens of the units `best` that may be chosen."""
        if self.unit == 1:
            return best
        tokens = (best[:, None] * self.unit + torch.arange(self.unit, device=best.device)).flatten()
        tokens = tokens[tokens < self.prefix.tokens]
        return tokens[~self._ends.closed[tokens]]

    def _with_always(self, chosen: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.always, chosen]).sort().values

    def _choose_scorer(self) -> Scorer | None:
        """The index that the spec names; None stands for attention to every token.

        Raises:
            InvalidSpec: the artifact has no such index.
        """
        index, wanted = self.prefix.index, self.spec.selector
        if self.reuses or wanted == "dense" or (wanted == "auto" and index is None):
            return None
        if wanted == "exact":
            return _ExactScorer(self.prefix)
        kind = _KINDS.get(wanted)
        if index is None or (kind is not None and not isinstance(index, kind)):
            raise InvalidSpec(
                f"selector={wanted!r}: the artifact was made without that index",
                hint='use selector="auto", or compress again with that index',
            )
        return index

    def _ends_of_prefix(self) -> _Ends:
        """The spec's own, and behind them what no whole unit speaks for."""
        tokens, known = self.prefix.tokens, _ENDS.setdefault(self.prefix, {})
        name = self.spec.sink, min(tokens - self.spec.recent, tokens // self.unit * self.unit)
        if name not in known:
            known[name] = _Ends(self.prefix, *name)
        return known[name]


class _Ends:
    """First and last tokens of a prefix, which are rebuilt for every query: shared by its selections.

    Args:
        sink: the first ones. last: where the last ones begin.

    Attributes:
        positions: int64, ascending, those of them that the factors describe.
    """

    def __init__(self, prefix: ReadablePrefix, sink: int, last: int) -> None:
        self._tokens, self._described = prefix.tokens, prefix.positions
        with torch.inference_mode(False):  # others may not be in inference mode
            self.positions = self._described[(self._described < sink) | (self._described >= last)]

    @cached_property
    def closed(self) -> torch.Tensor:
        """bool [tokens], those that are not chosen: rebuilt always, or exact. Kernels do not read it."""
        with torch.inference_mode(False):
            closed = torch.ones(self._tokens, dtype=torch.bool, device=self._described.device)
            closed[self._described] = False
            closed[self.positions] = True
        return closed


class Recorded:
    """A selection whose choices are kept for the next layer.

    Attributes:
        made: what was chosen, piece by piece.
    """

    def __init__(self, choosing: Choosing) -> None:
        self.prefix, self._choosing = choosing.prefix, choosing
        self.made: list[Selected] = []

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """As `Selection`."""
        self.made.append(self._choosing(queries, others, scoring))
        return self.made[-1]


class Repeated:
    """The choices that another layer made in this very call, for the same queries in the same pieces.

    Args:
        prefix: of the layer that takes them; the same tokens are exact in it. made: as `Recorded.made`.
    """

    def __init__(self, prefix: ReadablePrefix, made: Sequence[Selected]) -> None:
        self.prefix, self._left = prefix, iter(made)

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """The next piece's."""
        return next(self._left)


class _ExactScorer:
    """The scores that attention itself would compute: every key is rebuilt. A reference."""

    unit = 1

    def __init__(self, prefix: ReadablePrefix) -> None:
        self._prefix = prefix

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        everything = torch.arange(self._prefix.tokens, device=queries.device)
        keys = self._prefix.keys(everything)
        return (queries.to(keys.dtype) @ keys.permute(1, 2, 0)).float()
