"""One layer's attention for a batch of sessions, kernel after kernel (reference: `decode_attention_plainly`).

Nothing waits for the device and every shape is fixed, so a CUDA graph can hold it. Lengths, lists and their
counts stay on the device. `decoding/kernel_choice.py` says which caches decode by these kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from xkv_service.kernels.choose_tokens import ChooseTokens
from xkv_service.kernels.document_table import DocumentTable
from xkv_service.kernels.landmark_scores import LandmarkScores
from xkv_service.kernels.latent_values import LatentValues
from xkv_service.kernels.projected_output import projected_output
from xkv_service.kernels.rebuilt_scores import rebuilt_scores
from xkv_service.kernels.shared_attention import SharedAttention, SharedGroups
from xkv_service.kernels.sketch_scores import SketchScores
from xkv_service.kernels.tail_attention import tail_attention
from xkv_service.kernels.tail_table import TailTable


@dataclass(frozen=True)
class Tiles:
    """Options of the kernels, by name: what a benchmark tunes. Empty ones keep the kernels' own.

    `splits` are parts of the budget whose latent values are summed apart, so that programs fill the device.
    """

    index: dict[str, int] = field(default_factory=dict)
    choose: dict[str, int] = field(default_factory=dict)
    scores: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    splits: int = 4
    output: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """The sessions of a launch that attend to all of a document, and choose nothing.

    Args:
        groups: they. layer: index of the layer. all_sessions: whether no other session is in the launch.
    """

    groups: SharedGroups
    layer: int
    all_sessions: bool


class DecodeAttention:
    """Attention of one new token a session, for every layer of one shape; memory is taken once.

    Args:
        table: of a layer. query_heads, dim, value_dim: of layers.
        capacity: most tokens of a document. most: most tokens of a session's list (see `ChooseTokens`).
        turns: cos and sin [positions, D / 2], contiguous. scaling: of products. interleaved: as
            `rebuilt_scores`.
        chosen: where to keep what is chosen, for layers of another shape that take it; by default its own.
        rank: most ranks of values of a document, by default those of `table`.

    Raises:
        ValueError: a shape that kernels do not take.
    """

    def __init__(
        self, table: DocumentTable, query_heads: int, dim: int, value_dim: int, capacity: int, most: int,
        turns: tuple[torch.Tensor, torch.Tensor], scaling: float, *, interleaved: bool = False,
        tiles: Tiles | None = None, chosen: ChooseTokens | None = None, rank: int | None = None,
    ) -> None:  # fmt: skip
        _refuse(table, query_heads, dim, value_dim, turns)
        sessions, device = table.lengths.numel(), table.states.device
        self.tiles, self._turns = tiles or Tiles(), turns
        self._scaling, self._interleaved = scaling, interleaved
        heads, index = table.kv_heads, table.index_layout
        sizes = (sessions, capacity, heads, query_heads // heads, dim)
        self.index: SketchScores | LandmarkScores
        if index.landmarks is None:
            self.index = SketchScores(*sizes, index.planes, scaling, device, **self.tiles.index)
        else:
            self.index = LandmarkScores(
                *sizes, index.unit, index.landmarks, scaling, device, **self.tiles.index
            )
        self.chosen = chosen or ChooseTokens(sessions, capacity, most, device, **self.tiles.choose)
        self.values = LatentValues(
            sessions, query_heads, rank or table.value_rank, device, splits=self.tiles.splits
        )
        self.scores = torch.empty(sessions, query_heads, most, device=device)
        self._rest = torch.empty(sessions, query_heads, value_dim, device=device)
        self._rest_log = torch.empty(sessions, query_heads, device=device)
        self._heads = heads, query_heads // heads, dim, value_dim, table.dtype
        self._shared: SharedAttention | None = None

    def __call__(
        self, query: torch.Tensor, tails: TailTable, lengths: torch.Tensor, table: DocumentTable,
        out: torch.Tensor, *, repeat: bool = False, shared: Shared | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend.

        Args:
            query: [sessions, query_heads, D], rotated, contiguous. tails, lengths: as `tail_attention`.
            table: the layer's. out: [sessions, query_heads, Dv], contiguous.
            repeat: attend to what the layer before chose: this one has no index.
            shared: the sessions that attend to all of a document.

        Returns:
            `out`.
        """
        tail_attention(query, tails, lengths, self._rest, self._rest_log, self._scaling)
        if shared is not None:
            self._share(query, shared)
            if shared.all_sessions:
                return out.copy_(self._rest)
        if not repeat:
            self.index(query, self._rest_log, table)
            self.chosen(self.index.shares, table)
        self.attend(query, table, out)
        return out

    def _share(self, query: torch.Tensor, shared: Shared) -> None:
        if self._shared is None or self._shared.shape != shared.groups.shape:
            self._shared = SharedAttention(shared.groups.shape, *self._heads, query.device)
        self._shared(query, shared.groups, shared.layer, self._rest, self._rest_log, self._scaling)

    def attend(self, query: torch.Tensor, table: DocumentTable, out: torch.Tensor) -> None:
        """The stages behind the choice."""
        options: dict[str, Any] = {"interleaved": self._interleaved, **self.tiles.scores}
        rebuilt_scores(query, self.chosen, table, self._turns, self.scores, self._scaling, **options)
        self.values(self.scores, self.chosen, table, **self.tiles.values)
        projected_output(self.values, self._rest, self._rest_log, table, out, **self.tiles.output)


def _refuse(
    table: DocumentTable, query_heads: int, dim: int, value_dim: int, turns: tuple[torch.Tensor, torch.Tensor]
) -> None:
    if query_heads % table.kv_heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {table.kv_heads} KV heads")
    for name, size in (("head", dim), ("value", value_dim)):
        if size < 32 or size & (size - 1):
            raise ValueError(f"{name} dimensions of {size}: kernels take powers of 2 from 32")
    if any(tuple(one.shape[1:]) != (dim // 2,) for one in turns):
        raise ValueError(
            "kernels turn whole heads: cos and sin have half as many columns as a head dimensions"
        )
