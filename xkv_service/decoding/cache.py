"""`XKVCache`: a Transformers cache that holds a compressed prefix and an exact tail."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from xkv_service.decoding.cache_layer import PrefixLayer, WindowLayer
from xkv_service.decoding.fold import FOLD_ERROR, fold_tail
from xkv_service.decoding.kept_launches import KeptLaunches
from xkv_service.decoding.loading import load_factors
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.select import Selection
from xkv_service.decoding.state_layer import StateLayer
from xkv_service.decoding.tail_bytes import tail_bytes
from xkv_service.decoding.tail_ids import TailIds
from xkv_service.decoding.xkv_attention import attend_next, is_enabled
from xkv_service.errors import CacheMisuse
from xkv_service.factors import PrefixFactors
from xkv_service.selection.spec import SelectionSpec

if TYPE_CHECKING:
    from xkv_artifacts.store import ArtifactStore


# Layers that start with the prefix.
_Kept = PrefixLayer | WindowLayer | StateLayer


class XKVCache(Cache):  # type: ignore[misc]
    """A cache for `generate` and forward inside `enable_xkv(model)`: greedy, sampling, beams, batches, turns.

    The prefix is shared by every cache made from the same factors and never changes; the cache owns its tail.
    In a batch every row has the same prefix. Padding between prefix and new tokens takes room in sliding
    windows and enters linear-attention states, as with Transformers' own cache: with such layers, rows of
    different lengths answer as each alone does only in calls of their own.

    Args:
        prefix: the compressed prefix, bound to a model. selection: which of its tokens attention rebuilds.

    Attributes:
        tail_ids: the tokens of the tail, as far as they were given as ids.
        launches: what kernels need for its steps, where they attend.

    Raises:
        InvalidSpec: the selection needs an index that the artifact does not have.
    """

    def __init__(self, prefix: Prefix, selection: SelectionSpec | None = None) -> None:
        self.prefix, self.selection = prefix, selection or SelectionSpec()
        layers = list(DynamicCache(config=prefix.model.config).layers)
        for index in prefix.compressed:
            layers[index] = self._prefix_layer(index)
        for index, (keys, values) in prefix.windows.items():
            layers[index] = WindowLayer(layers[index].sliding_window, keys, values, prefix.tokens)
        for index, state in prefix.states.items():
            layers[index] = StateLayer(layers[index].number_of_states, state, prefix.model.device)
        super().__init__(layers=layers)
        self.tail_ids = TailIds()
        self.launches = KeptLaunches()

    @classmethod
    def from_factors(
        cls,
        model: PreTrainedModel,
        factors: PrefixFactors,
        selection: SelectionSpec | None = None,
        *,
        tokens: int | None = None,
    ) -> XKVCache:
        """A cache that starts with a compressed prefix.

        Args:
            model: the model the factors were made with. factors: on any device.
            tokens: p, use the first p tokens of the prefix only; by default all.

        Raises:
            ModelMismatch: the factors were made with another model.
            UnsupportedModel: the model's cache cannot be compressed.
            InvalidSpec: `tokens` out of range, or a selection without its index.
        """
        return cls(Prefix.of(model, factors, tokens), selection)

    @classmethod
    def from_artifact(
        cls,
        model: PreTrainedModel,
        store: ArtifactStore,
        artifact_id: str,
        selection: SelectionSpec | None = None,
        *,
        tokens: int | None = None,
        rank_k: int | None = None,
        rank_v: int | None = None,
    ) -> XKVCache:
        """A cache that starts with a stored prefix.

        Args:
            tokens: as in `from_factors`.
            rank_k, rank_v: leading ranks to read of keys and of values; by default all. Only the column
                blocks that hold them are read.

        Raises:
            ArtifactNotFound, CorruptArtifact: the store has no such artifact, or a damaged one.
            ModelMismatch, UnsupportedModel, InvalidSpec: as in `from_factors`.
        """
        factors = load_factors(store, artifact_id, model=model, rank_k=rank_k, rank_v=rank_v)
        return cls.from_factors(model, factors, selection, tokens=tokens)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer's tail and return what the model's attention is to see of it.

        Args:
            key_states, value_states: of t new tokens, keys rotated: [rows, kv_heads, t, D].

        Returns:
            Keys and values, [rows, kv_heads, n + t, D] of the tail's n + t tokens; of a window those in it.

        Raises:
            CacheMisuse: the model is not inside `enable_xkv`, so that its own attention would miss the
                prefix, or it is another one than the cache was made for.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, PrefixLayer):
            if not is_enabled(self.prefix.model):
                raise CacheMisuse(
                    "the model's attention cannot read this cache: it would answer without the prefix",
                    hint="call it inside `with enable_xkv(model):`",
                )
            self.follow(layer_idx)
            layer.owner = self
            attend_next(layer, self.prefix.modules[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of the tail (Transformers 5 takes a negative number).

        Raises:
            CacheMisuse: more tokens than the exact tail has, or a layer whose window or state cannot go
                back; the cache is then as it was.
        """
        if tokens_to_remove and not all(_can_crop(layer) for layer in self.layers):
            raise CacheMisuse(
                "sliding windows and linear-attention states cannot go back: no tokens can be removed",
                hint="fork() the cache before tokens that may be taken back",
            )
        super().crop(tokens_to_remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> XKVCache:
        """A fork: the prefix and the model are shared."""
        return self.fork()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the tails of other rows of the batch: of row beam_idx[i] (int64 [rows]) in row i."""
        super().reorder_cache(beam_idx)
        self.tail_ids = self.tail_ids.rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of the batch that int64 [kept] names, in that order."""
        super().batch_select_indices(indices)
        self.tail_ids = self.tail_ids.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.tail_ids = self.tail_ids.repeated(repeats)

    def serve(self, given: torch.Tensor) -> None:
        """Be ready for a call with ids [rows, t] or embeddings [rows, t, D].

        Linear-attention layers look at their states before the cache sees the batch.
        """
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.serve(given.shape[0])
        self.tail_ids = self.tail_ids.extended(int(self.get_seq_length()) - self.prefix.tokens, given)

    def follow(self, layer_idx: int) -> None:
        """Before a layer attends: show it the layer whose choice it takes, if it takes one."""
        layer = self.layers[layer_idx]
        if isinstance(layer, PrefixLayer) and layer.selection.reuses:
            layer.leader = self.layers[self.prefix.leaders[layer_idx]]

    def fork(self) -> XKVCache:
        """A second cache with the same prefix and tail; both go on by themselves. Nothing is copied."""
        other = copy.copy(self)
        other.layers = [_fork(layer) for layer in self.layers]
        other.launches = KeptLaunches()
        return other

    def fold(self, *, keep: int = 0, error: float = FOLD_ERROR) -> int:
        """Make all but the last `keep` tokens of the tail into factors, as `fold_tail`; returns how many."""
        return fold_tail(self, keep=keep, error=error)

    def reset(self) -> None:
        """Forget the tail, folded tokens included."""
        for index, layer in enumerate(DynamicCache(config=self.prefix.model.config).layers):
            if isinstance(self.layers[index], PrefixLayer):
                self.layers[index] = self._prefix_layer(index)
            elif isinstance(self.layers[index], _Kept):
                self.layers[index].reset()
            else:
                self.layers[index] = layer

    def _prefix_layer(self, index: int) -> DynamicLayer:
        leaders = self.prefix.leaders if self.selection.by_index else {}
        selection = Selection(self.prefix.layers[index], self.selection, reuses=index in leaders)
        return PrefixLayer(index, selection, followed=index in leaders.values())

    @property
    def tail_tokens(self) -> int:
        """n, tokens of the tail that are exact."""
        return next(layer.tail_tokens for layer in self.layers if isinstance(layer, PrefixLayer))

    @property
    def folded_tokens(self) -> int:
        """Tokens behind the prefix that `fold` made into factors."""
        return int(self.get_seq_length()) - self.prefix.tokens - self.tail_tokens

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail, folded tokens, windows and states included: what one more session costs."""
        return tail_bytes(self, self.prefix.tokens)

    @property
    def rebuilt_tokens(self) -> float:
        """Prefix tokens rebuilt at the last call, averaged over the compressed layers."""
        counts = [layer.rebuilt for layer in self.layers if isinstance(layer, PrefixLayer)]
        return sum(counts) / len(counts)


def _can_crop(layer: Any) -> bool:
    """Whether the layer still has everything that an earlier token sees."""
    if isinstance(layer, WindowLayer):
        return int(layer.get_seq_length()) < int(layer.sliding_window)
    return not isinstance(layer, StateLayer)


def _fork(layer: Any) -> Any:
    return layer.fork() if isinstance(layer, _Kept) else copy.deepcopy(layer)
