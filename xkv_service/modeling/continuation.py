"""Whether a model goes on from the states of its linear-attention layers as it computes a whole prefix.

Some models do not when they are given several tokens at once: Jamba starts its recurrence anew, Bamba counts
its positions from zero again (Transformers 5.23). A prefix from a cache, or cut into chunks, would be wrong.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from xkv_service.errors import UnsupportedModel

_TOKENS, _HELD = 32, 16
# Relative distance of logits: rounding, and experts that rounding chooses otherwise at single positions.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def refuse_broken_continuation(model: PreTrainedModel) -> None:
    """Run a few tokens whole and in two parts.

    Raises:
        UnsupportedModel: the second part comes out otherwise, or does not depend on the recurrent states.
    """
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(0, vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    was_training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            whole = model(input_ids=ids, use_cache=False).logits[0, _HELD:].float()
            parts = _continued(model, ids)
            disturbed = _continued(model, ids, disturb=True)
    finally:
        model.train(was_training)
    distance = (parts - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-30)
    if float(distance.median()) > _TOLERANCE.get(model.dtype, 1e-4) or torch.equal(parts, disturbed):
        raise UnsupportedModel(
            f"{type(model).__name__} does not go on from a cached prefix as it computes a whole one",
            hint="its linear-attention layers need one call for all tokens; use another model",
        )


def _continued(model: PreTrainedModel, ids: torch.Tensor, *, disturb: bool = False) -> torch.Tensor:
    """Logits [t, vocabulary] of the second part; `disturb`: from other states than the first part's."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :_HELD], past_key_values=cache, use_cache=True)
    if disturb:
        for layer in cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                _disturb(layer)
    logits: torch.Tensor = model(input_ids=ids[:, _HELD:], past_key_values=cache, use_cache=True).logits[0]
    return logits.float()


def _disturb(layer: LinearAttentionLayer) -> None:
    """Change the recurrent states past any rounding; where there are none (lfm2), those of convolutions."""
    recurrent = [state for state in layer.recurrent_states.values() if state is not None]
    for state in recurrent or [state for state in layer.conv_states.values() if state is not None]:
        state.add_(1.0).mul_(1e3)
