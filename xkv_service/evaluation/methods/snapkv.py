"""SnapKV (arXiv 2404.14469): keep the tokens that the end of the prompt attends to, evict the rest.

The queries of the last tokens (the observation window) attend to the tokens before them; the attention that
each receives is summed over the window and averaged with its neighbours' (section 4). Every KV head keeps the
tokens that receive most, and the window. It sees the prefix it is given and nothing else: where no question
stands in it, the window is the document's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.exact_layers import ExactLayers, number_bytes
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.observation import observe
from xkv_service.prefilling.prefill_run import can_fuse_chunks
from xkv_service.prefilling.prefilled import Prefill

States = tuple[torch.Tensor, torch.Tensor]


class EvictedLayer(DynamicLayer):  # type: ignore[misc]
    """A growing cache layer some of whose prefix is gone; positions go on as if it were there.

    Args:
        keys, values: [1, kv_heads, kept, D], copied; the tokens differ from head to head.
        tokens: T, tokens of the prefix before eviction.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        super().__init__()
        self.prefix, self.evicted = tokens, tokens - keys.shape[-2]
        self.update(keys, values)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included."""
        return int(self.keys.shape[-2]) + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys held and to come, and the position of the first: what is kept of the prefix lies before it."""
        return int(self.keys.shape[-2]) + query_length, self.evicted

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: they reach into the prefix.
        """
        if -tokens_to_remove > self.get_seq_length() - self.prefix:
            raise ValueError(f"crop({tokens_to_remove}) reaches into the prefix, of which tokens are evicted")
        super().crop(tokens_to_remove)


@dataclass(frozen=True, eq=False)
class SelectedPrefix:
    """The tokens kept of a prefix.

    Args:
        tokens: T.
        kept: by layer index, rotated keys and values [1, kv_heads, kept, D], in order of position.
        others: the layers that are left alone.
    """

    tokens: int
    kept: dict[int, States]
    others: ExactLayers

    @property
    def nbytes(self) -> int:
        """Bytes held; positions are not needed any more, since keys are kept rotated."""
        return number_bytes(side for both in self.kept.values() for side in both) + self.others.nbytes

    @torch.no_grad()
    def cache(self) -> DynamicCache:
        """A cache of the tokens kept, in memory of its own."""
        return self.others.cache(
            {index: EvictedLayer(*both, self.tokens) for index, both in self.kept.items()}
        )


class SnapKV:
    """Keep T / ratio tokens in every KV head, or `budget` of them, the observation window included.

    Args:
        ratio: tokens for each one kept, 1 or more.
        budget: tokens kept, instead of `ratio`.
        window: tokens of the observation window.
        kernel: width of the pooling along the tokens, odd: what stands beside attended tokens is kept too.

    Raises:
        InvalidSpec: an option is out of range.
    """

    name = "snapkv"

    def __init__(
        self, ratio: float = 8.0, budget: int | None = None, window: int = 32, kernel: int = 7
    ) -> None:
        if not ratio >= 1:
            raise InvalidSpec(f"ratio={ratio} is out of range", hint="give a ratio of 1 or more")
        if window < 1 or (budget is not None and budget < window):
            raise InvalidSpec(
                f"window={window}, budget={budget}: no room for the window",
                hint="give a window of 1 or more tokens and a budget that holds it",
            )
        if kernel < 1 or kernel % 2 == 0:
            raise InvalidSpec(f"kernel={kernel} is not odd", hint="give an odd number, such as 7")
        self.ratio, self.budget, self.window, self.kernel = ratio, budget, window, kernel

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel, exact: Prefill) -> SelectedPrefix:
        """Select the tokens of a prefill. A window longer than T / ratio is kept whole all the same.

        Raises:
            InvalidSpec: a model with sliding-window or linear-attention layers, prefilled without a tail to
                observe, or one that caches latents.
        """
        _refuse_latents(exact)
        window = self._window(exact)
        asked = round(exact.tokens / self.ratio) if self.budget is None else self.budget
        kept = min(exact.tokens, max(window, asked))
        seen = _observe_tail(model, exact, window)
        states = {}
        for layer in exact.layout.compressible:
            scores = window_attention(seen[layer.index], exact.rotated_keys(layer.index))
            positions = select(scores, kept - window, window, self.kernel)
            states[layer.index] = _gather(exact, layer.index, positions)
        return SelectedPrefix(exact.tokens, states, ExactLayers.of(model, exact))

    def _window(self, exact: Prefill) -> int:
        """Tokens to observe: windows and states are known only where the prefill's tail begins."""
        most = exact.tail if exact.layout.exact else exact.tokens - 1
        if most < 1:
            raise InvalidSpec(
                f"a prefix of {exact.tokens} tokens with a tail of {exact.tail} has nothing to observe",
                hint=f"prefill it with tail={self.window}",
            )
        return min(self.window, most)


@dataclass(frozen=True, eq=False)
class WindowQueries:
    """What one layer asks from the observation window.

    Args:
        queries: rotated, [query_heads, w, D].
        scaling: factor of the scores.
        softcap: bound of the scores where the model has one.
        sinks: [query_heads], a score that every query spends on nothing, where the model has it.
    """

    queries: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def window_attention(seen: WindowQueries, keys: torch.Tensor) -> torch.Tensor:
    """Attention that each token before the window receives from it.

    Args:
        keys: rotated, [T, kv_heads, D].

    Returns:
        float32 [kv_heads, T - w]: summed over the window, averaged over a KV head's query heads.
    """
    tokens, heads = keys.shape[:2]
    window = seen.queries.shape[1]
    queries = seen.queries.float().view(heads, -1, *seen.queries.shape[1:])
    later = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
    received = []
    for head in range(heads):
        logits = queries[head] @ keys[:, head].float().T * seen.scaling
        if seen.softcap is not None:
            logits = seen.softcap * torch.tanh(logits / seen.softcap)
        logits = logits.masked_fill(later, -torch.inf)
        if seen.sinks is not None:
            sinks = seen.sinks.float().view(heads, -1)[head][:, None, None]
            logits = torch.cat((logits, sinks.expand(-1, window, 1)), dim=-1)
        received.append(logits.softmax(-1)[..., : tokens - window].sum(1).mean(0))
    return torch.stack(received)


def select(scores: torch.Tensor, count: int, window: int, kernel: int) -> torch.Tensor:
    """Positions to keep, in order.

    Args:
        scores: float32 [kv_heads, T - w]. count: tokens to keep of those. kernel: width of the pooling.

    Returns:
        int64 [kv_heads, count + w]: each head's best `count` tokens, and the window.
    """
    heads, before = scores.shape
    pooled = nn.functional.avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
    best = pooled.topk(count, dim=-1).indices.sort(-1).values
    last = torch.arange(before, before + window, device=scores.device).expand(heads, -1)
    return torch.cat((best, last), dim=-1)


def _refuse_latents(exact: Prefill) -> None:
    if any(layer.kind == "latent" for layer in exact.layout.layers):
        raise InvalidSpec(
            "snapkv: this model caches latents, which no query attends to", hint="use another method"
        )


def _gather(exact: Prefill, layer: int, positions: torch.Tensor) -> States:
    """Rotated keys and values [1, kv_heads, n, D] at positions int64 [kv_heads, n]."""
    heads = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return exact.rotated_keys(layer)[positions, heads][None], exact.values(layer)[positions, heads][None]


class _TailObserver:
    """Keeps the queries of the last tokens, by layer index."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen: dict[int, WindowQueries] = {}

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        """Keep queries [1, query_heads, t, D]."""
        tail = query[0, :, -self.window :]
        scaling = getattr(module, "scaling", tail.shape[-1] ** -0.5)
        softcap, sinks = getattr(module, "attn_logit_softcapping", None), getattr(module, "sinks", None)
        self.seen[int(module.layer_idx)] = WindowQueries(tail, float(scaling), softcap, sinks)  # type: ignore[arg-type]

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Nothing."""


def _observe_tail(model: PreTrainedModel, exact: Prefill, window: int) -> dict[int, WindowQueries]:
    """Run the last tokens once more over the exact cache of those before them, and note their queries."""
    tail = exact.tail if exact.layout.exact else window
    before = exact.tokens - tail
    ids = exact.token_ids[before:].to(model.device)[None]
    observer = _TailObserver(window)
    fused = can_fuse_chunks(model, inspect_loaded(model))
    with _restored(exact, before), observe(model, observer, [], fused_chunks=fused):
        model(input_ids=ids, past_key_values=exact.cache(before), use_cache=True)
    return observer.seen


@contextmanager
def _restored(exact: Prefill, start: int) -> Iterator[None]:
    """Put back the keys and values from `start` on, bit for bit: another chunking rounds otherwise."""
    views = [
        states
        for layer in exact.layout.compressible
        for states in (exact.rotated_keys(layer.index, start), exact.values(layer.index, start))
    ]
    saved = [view.clone() for view in views]
    try:
        yield
    finally:
        for view, states in zip(views, saved, strict=True):
            view.copy_(states)
