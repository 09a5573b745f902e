"""The cache layer of a full-attention layer: a shared compressed prefix and the session's exact tail."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from xkv_service.decoding.attend import attend
from xkv_service.decoding.attention_call import AttentionCall
from xkv_service.decoding.growing_layer import GrowingLayer
from xkv_service.decoding.kernel_choice import MOST_TOKENS, kernels_run, takes
from xkv_service.decoding.select import Choosing, Recorded, Repeated, Selected, Selection
from xkv_service.errors import CacheMisuse

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache


class PrefixLayer(GrowingLayer):
    """Keys and values of the tail, behind a prefix that only attention reads.

    `update` returns the tail alone; lengths and masks count prefix and tail.

    Args:
        index: layer index in the model. selection: chooses tokens of the layer's prefix.
        followed: whether the next layer takes what this one chooses.

    Attributes:
        keys, values: the tail [batch, kv_heads, n, D], or None.
        rebuilt: prefix tokens rebuilt at the last call of attention; by landmarks and kernels at most.
        leader: during a call, the layer of the same cache whose choice this one takes.
        owner: during a call, the cache whose kernels may attend; None: PyTorch does.
    """

    def __init__(self, index: int, selection: Selection, *, followed: bool = False) -> None:
        super().__init__()
        self.index, self.selection, self.rebuilt = index, selection, 0
        self.leader: PrefixLayer | None = None
        self.owner: XKVCache | None = None
        self._followed = followed
        self._chosen: list[Selected] | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention over the prefix and the tail.

        Raises:
            CacheMisuse: the layer that this one follows did not run before it in this call.
        """
        owner, self.owner = self.owner, None
        if owner is not None and _is_plain(call, owner):
            rows, _, count, _ = call.query.shape
            query = call.query.transpose(1, 2).flatten(0, 1)
            for _, launch in owner.launches.of([owner], call.scoring, [count]):
                out = launch.attend([self], query, call.scoring.scaling)
                return out.reshape(rows, count, *out.shape[1:])
        choosing: Choosing = self.selection
        if self.selection.reuses:
            choosing = Repeated(self.selection.prefix, self._leaders_choice())
        if self._followed:
            choosing = recorded = Recorded(choosing)
            self._chosen = recorded.made
        out, self.rebuilt = attend(call.query, call.keys, call.values, call.mask, choosing, call.scoring)
        return out

    def _leaders_choice(self) -> list[Selected]:
        """Taken once, so that no call sees the choice of another."""
        leader, self.leader = self.leader, None
        chosen = None if leader is None else leader._chosen
        if leader is None or chosen is None or leader.tail_tokens != self.tail_tokens:
            raise CacheMisuse(
                f"layer {self.index} attends to what the layer before it chose, and that one did not run",
                hint="run the model's layers in order, all of them",
            )
        leader._chosen = None
        return chosen

    def leaders_state(self) -> tuple[int, int]:
        """Of the layer whose choice this one takes: its index and the tokens of its tail."""
        return (-1, -1) if self.leader is None else (self.leader.index, self.leader.tail_tokens)

    def ran_by_kernels(self, rebuilt: int) -> None:
        """Note that kernels attended, and how many tokens of the prefix they rebuilt at most a session."""
        self.rebuilt, self.leader, self._chosen = rebuilt, None, None

    @property
    def prefix_tokens(self) -> int:
        """p, tokens of the prefix."""
        return self.selection.prefix.tokens

    @property
    def tail_tokens(self) -> int:
        """n, tokens of the tail."""
        return int(super().get_seq_length())

    def get_seq_length(self) -> int:
        """p + n."""
        return self.prefix_tokens + self.tail_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask for `query_length` new tokens, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def begin_tail(self) -> None:
        """A tail of one row without tokens, where there is none: somebody will write tokens by address."""
        if not self.is_initialized:
            prefix = self.selection.prefix
            keys, values = (
                one.new_empty(0, *one.shape[1:]) for one in (prefix.exact_keys, prefix.exact_values)
            )
            keys, values = (one.transpose(0, 1)[None] for one in (keys, values))
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of the tail (Transformers 5 takes a negative number).

        Raises:
            CacheMisuse: more tokens than the tail has.
        """
        if -tokens_to_remove > self.tail_tokens:
            raise CacheMisuse(
                f"crop of {-tokens_to_remove} tokens reaches into the prefix: the tail has "
                f"{self.tail_tokens}",
                hint="take a shorter prefix with tokens=, or start from a new cache",
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget the tail; the prefix stays."""
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the tails of other rows of the batch; the prefix is the same for all."""
        if self.tail_tokens:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row's tail."""
        if self.tail_tokens:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows' tails."""
        if self.tail_tokens:
            super().batch_select_indices(indices)

    def drop_first(self, tokens: int) -> None:
        """Remove the first tokens of the tail, which are part of the prefix now."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, tokens:].clone(), self.values[:, :, tokens:].clone()

    def fork(self) -> PrefixLayer:
        """The same prefix and the tail as it is now; tails grow by making new tensors: nothing is copied."""
        return copy.copy(self)


def _is_plain(call: AttentionCall, owner: XKVCache) -> bool:
    """Whether new tokens see all that is before them, and nobody asks for gradients."""
    if any(states.requires_grad for states in (call.query, call.keys, call.values)):
        return False
    rows, _, count, _ = call.query.shape
    if call.mask is None:
        return count == 1
    few = rows == 1 and count <= MOST_TOKENS and call.mask.dtype == torch.bool
    return (
        few and takes(call.scoring) and kernels_run(call.query.device) and owner.launches.is_causal(call.mask)
    )


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding layer that starts with the prefix's last window, for as many rows as the first call brings.

    Args:
        sliding_window: tokens a query sees, itself included.
        keys, values: the window [1, kv_heads, w, D], keys rotated. tokens: p, tokens of the prefix.
    """

    def __init__(self, sliding_window: int, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        super().__init__(sliding_window)
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, tokens
        self._prefix = (keys, values, tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a sliding layer does; one row of the prefix serves a batch."""
        rows = key_states.shape[0]
        if self.keys.shape[0] == 1 and rows > 1:
            self.keys, self.values = self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return result

    def reset(self) -> None:
        """Back to the prefix's window."""
        self.keys, self.values, self.cumulative_length = self._prefix

    def fork(self) -> WindowLayer:
        """The layer as it is now. Windows move by making new tensors, so nothing is copied."""
        return copy.copy(self)
