"""The cache layer of a linear-attention layer: the state after the prefix, then the session's own."""

from __future__ import annotations

import torch
from transformers.cache_utils import LinearAttentionLayer

from xkv_service.modeling.linear_state import LayerState, change_states, copy_state_layer, fill_state


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A linear-attention layer that starts with the state after the prefix, the same for every row.

    Args:
        number_of_states: of the layer in Transformers' own cache.
        state: after the prefix. device: the model's.
    """

    def __init__(self, number_of_states: int, state: LayerState, device: torch.device) -> None:
        super().__init__(number_of_states)
        self._prefix = (state, device)
        fill_state(self, state, device)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return next(int(state.shape[0]) for state in held if state is not None)

    def serve(self, rows: int) -> None:
        """Give each of `rows` sessions a state of its own, before the first call that brings so many."""
        if self.rows == 1 and rows > 1:
            change_states(self, lambda state: state.repeat_interleave(rows, 0))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row's state."""
        change_states(self, lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows' states."""
        change_states(self, lambda state: state[indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the states of other rows of the batch."""
        change_states(self, lambda state: state.index_select(0, beam_idx.to(state.device)))

    def reset(self) -> None:
        """Back to the state after the prefix."""
        state, device = self._prefix
        fill_state(self, state, device)

    def fork(self) -> StateLayer:
        """The layer as it is now, with states of its own: they change in place."""
        return copy_state_layer(self)
