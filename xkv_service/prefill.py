"""Exact prefill of prefixes in chunks, with what compression needs observed on the way.

prefix = prefill(model, token_ids, tail=64)
prefix.keys(layer, 0, 512)      # before RoPE
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from xkv_service.errors import InvalidPrompt
from xkv_service.inspect import InspectedModel, inspect_loaded
from xkv_service.observation import observe
from xkv_service.prefilled import Prefill
from xkv_service.prefix_cache import StorageLayer, copy_sliding_layer
from xkv_service.rotary_probe import PositionEmbeddings, split_cos_sin
from xkv_service.rotary_source import frequency_change, model_frequencies, refuse_unstable_frequencies

CHUNK_TOKENS_CPU = 512
CHUNK_TOKENS_CUDA = 8192

TokenIds = Sequence[int] | torch.Tensor


def prefill(
    model: PreTrainedModel, input_ids: TokenIds, *, chunk_tokens: int | None = None, tail: int = 0
) -> Prefill:
    """Run the model over one prefix and keep its exact cache.

    Args:
        model: a supported model; its attention implementation and hooks are as before when this returns.
        input_ids: token ids, list or integer tensor [T] or [1, T].
        chunk_tokens: most tokens in one forward; by default chosen by device.
        tail: last positions whose next-token logits are kept, and the position `cache(tokens=T - tail)`
            can be taken at in a model with sliding-window layers.

    Raises:
        UnsupportedModel: the model's cache cannot be compressed.
        InvalidPrompt: no tokens, or a `tail` as long as the prefix.
    """
    return prefill_batch(model, [input_ids], chunk_tokens=chunk_tokens, tail=tail)[0]


def prefill_batch(
    model: PreTrainedModel,
    documents: Sequence[TokenIds],
    *,
    chunk_tokens: int | None = None,
    tail: int | Sequence[int] = 0,
) -> list[Prefill]:
    """Run the model over several prefixes of similar length at once, padded on the right.

    Attention is causal, so no real token sees a pad. The prefixes share storage: free them together. A model
    with sliding-window layers runs them one by one, since pads would push tokens out of the window.

    Args:
        documents: token ids, each as in `prefill`.
        chunk_tokens, tail: as in `prefill`; one tail for all, or one per document.

    Raises:
        UnsupportedModel, InvalidPrompt: as `prefill`.
    """
    inspected = inspect_loaded(model)
    tails = [tail] * len(documents) if isinstance(tail, int) else tail
    jobs = [_Document.of(ids, tail) for ids, tail in zip(documents, tails, strict=True)]
    for job in jobs:
        refuse_unstable_frequencies(model.config, job.length)
    chunk = chunk_tokens or (CHUNK_TOKENS_CUDA if model.device.type == "cuda" else CHUNK_TOKENS_CPU)
    results: list[Prefill] = []
    with torch.inference_mode():
        for batch in _batches(model, inspected, jobs):
            results += _Run(model, inspected, batch, chunk).prefills()
    return results


@dataclass(frozen=True, eq=False)
class _Document:
    ids: torch.Tensor
    tail: int

    @classmethod
    def of(cls, document: TokenIds, tail: int) -> _Document:
        """Check the ids of one document and the tail asked of it."""
        ids = torch.as_tensor(document, dtype=torch.int64).flatten().cpu()
        if ids.numel() == 0:
            raise InvalidPrompt("the prefix has no tokens", hint="give a document that is not empty")
        if tail < 0 or tail >= ids.numel():
            raise InvalidPrompt(
                f"tail={tail} does not fit a prefix of {ids.numel()} tokens",
                hint="use a tail shorter than the prefix",
            )
        return cls(ids, tail)

    @property
    def length(self) -> int:
        return self.ids.numel()

    @property
    def tail_positions(self) -> range:
        return range(self.length - self.tail, self.length)


def _batches(
    model: PreTrainedModel, inspected: InspectedModel, jobs: list[_Document]
) -> list[list[_Document]]:
    """The documents in order, cut into runs that may be padded together."""
    change = frequency_change(model.config)
    longest = max((job.length for job in jobs), default=0)
    if inspected.layout.has_sliding or (change is not None and longest > change[1]):
        return [[job] for job in jobs]
    return [jobs] if jobs else []


def _can_fuse_chunks(model: PreTrainedModel, inspected: InspectedModel) -> bool:
    """Whether CUDA's fused causal attention takes chunks that start behind position 0."""
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and all(one.head_dim == one.value_dim <= 256 for one in inspected.layout.compressible)
    )


def _as_ids(document: TokenIds, tail: int) -> torch.Tensor:
    ids = torch.as_tensor(document, dtype=torch.int64).flatten()
    if ids.numel() == 0:
        raise InvalidPrompt("the prefix has no tokens", hint="give a document that is not empty")
    if tail < 0 or tail >= ids.numel():
        raise InvalidPrompt(
            f"tail={tail} does not fit a prefix of {ids.numel()} tokens",
            hint="use a tail shorter than the prefix",
        )
    return ids


@dataclass
class _Observations:
    """What the model showed while it ran.

    Args:
        lengths: tokens of each document in the batch.
        start: position of the chunk that is running.
        energy: per layer, sum of squares of the rotated queries, float32 [documents, heads, D].
        tables: per layer, the `position_embeddings` of each chunk. Layers of a kind share the tensors.
    """

    lengths: list[int]
    start: int = 0
    energy: dict[int, torch.Tensor] = field(default_factory=dict)
    tables: dict[int, list[PositionEmbeddings]] = field(default_factory=dict)

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        rows = []
        for row, length in enumerate(self.lengths):
            seen = query[row, :, : max(0, length - self.start)]
            rows.append(torch.linalg.vector_norm(seen, dim=1, dtype=torch.float32).square())
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        total = torch.stack(rows)
        self.energy[layer] = self.energy[layer] + total if layer in self.energy else total

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        embeddings = arguments.get("position_embeddings")
        if embeddings is not None:
            self.tables.setdefault(int(module.layer_idx), []).append(embeddings)  # type: ignore[arg-type]


class _Run:
    """One batch through the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        inspected: InspectedModel,
        ids: list[torch.Tensor],
        tail: int,
        chunk: int,
    ) -> None:
        self.model, self.inspected, self.ids, self.tail, self.chunk = model, inspected, ids, tail, chunk
        self.lengths = [one.numel() for one in ids]
        self.longest = max(self.lengths)
        self.seen = _Observations(self.lengths)
        self.cache = self._empty_cache()
        self.logits: list[list[torch.Tensor]] = [[] for _ in ids]
        self.sliding_at_tail: dict[int, DynamicSlidingWindowLayer] = {}
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefills(self) -> list[Prefill]:
        padded = torch.zeros(len(self.ids), self.longest, dtype=torch.int64)
        for row, one in enumerate(self.ids):
            padded[row, : one.numel()] = one
        padded = padded.to(self.model.device)
        modules = list(self.inspected.modules.values())
        with observe(
            self.model, self.seen, modules, fused_chunks=_can_fuse_chunks(self.model, self.inspected)
        ):
            for start, end in self._chunks():
                self.seen.start = start
                self._forward(padded[:, start:end], start, end)
        self.frequencies = model_frequencies(self.model)
        return [self._result(row) for row in range(len(self.ids))]

    def _empty_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for layer in self.inspected.layout.compressible:
            cache.layers[layer.index] = StorageLayer(self.longest)
        return cache

    def _chunks(self) -> list[tuple[int, int]]:
        """Chunk bounds; with sliding layers one of them is where the tail begins."""
        change = frequency_change(self.model.config)
        first = self.chunk
        if change is not None and self.longest > change[1]:
            # Longrope looks at the last position of a forward: none may end where the short factors hold.
            first = max(first, change[1] + 1)
        bounds = {0, *range(first, self.longest, self.chunk), self.longest}
        if self.inspected.layout.has_sliding and self.tail:
            bounds.add(self.longest - self.tail)
        ordered = sorted(bounds)
        return list(zip(ordered, ordered[1:], strict=False))

    def _forward(self, ids: torch.Tensor, start: int, end: int) -> None:
        if self.inspected.layout.has_sliding and start == self.longest - self.tail:
            self.sliding_at_tail = self._sliding_layers()
        wanted = sorted(
            {position for row in self._tail_rows() for position in row if start <= position < end}
        )
        kept = [position - start for position in wanted] or [end - start - 1]
        extra = {"logits_to_keep": torch.tensor(kept, device=ids.device)} if self.keeps_logits else {}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra)
        logits = out.logits if self.keeps_logits else out.logits[:, kept]
        for row, positions in enumerate(self._tail_rows()):
            mine = [index for index, position in enumerate(wanted) if position in positions]
            if mine:
                self.logits[row].append(logits[row, mine[0] : mine[-1] + 1].float())

    def _tail_rows(self) -> list[range]:
        return [range(length - self.tail, length) for length in self.lengths]

    def _sliding_layers(self) -> dict[int, DynamicSlidingWindowLayer]:
        return {
            layer.index: copy_sliding_layer(self.cache.layers[layer.index])
            for layer in self.inspected.layout.layers
            if layer.kind == "sliding"
        }

    def _result(self, row: int) -> Prefill:
        length = self.lengths[row]
        full = [layer.index for layer in self.inspected.layout.compressible]
        storage = {index: self.cache.layers[index] for index in full}
        return Prefill(
            config=self.model.config,
            layout=self.inspected.layout,
            token_ids=self.ids[row],
            keys={i: storage[i].key_storage[row : row + 1, :, :length] for i in full},
            values={i: storage[i].value_storage[row : row + 1, :, :length] for i in full},
            sliding=self._sliding_layers(),
            sliding_at_tail=self.sliding_at_tail,
            tail=self.tail,
            logits_tail=torch.cat(self.logits[row]) if self.tail else None,
            energy={index: total[row] / length for index, total in self.seen.energy.items()},
            forms=self.inspected.forms,
            tables=self._plane_tables(length),
            frequencies=self.frequencies,
        )

    def _plane_tables(self, length: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Per full layer, cos and sin [length, P]; layers given the same tensors share the result."""
        made: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        tables = {}
        for index, chunks in self.seen.tables.items():
            form = self.inspected.forms[index]
            name = (id(chunks[0]), id(split_cos_sin(chunks[0])[0]), *form.signature)
            if name not in made:
                pieces = [form.plane_tables(chunk) for chunk in chunks]
                cos = torch.cat([piece[0][0] for piece in pieces])[:length]
                sin = torch.cat([piece[1][0] for piece in pieces])[:length]
                made[name] = (cos, sin)
            tables[index] = made[name]
        return tables
