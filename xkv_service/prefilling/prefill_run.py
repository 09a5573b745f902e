"""One padded batch through the model, chunk by chunk, and what it shows on the way."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from xkv_artifacts.errors import first_line
from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.inspect import InspectedModel
from xkv_service.modeling.model_files import context_window
from xkv_service.modeling.observation import observe
from xkv_service.modeling.rotary_probe import PositionEmbeddings
from xkv_service.modeling.rotary_source import (
    Frequencies,
    frequency_change,
    model_frequencies,
    refuse_unstable_frequencies,
)
from xkv_service.prefilling.chunking import chunk_tokens
from xkv_service.prefilling.prefilled import PlaneTables, Prefill
from xkv_service.prefilling.prefix_cache import ExactLayer, StorageLayer, copy_exact_layer

TokenIds = Sequence[int] | torch.Tensor

_IDS = "give the ids of one text, a list or an integer tensor of shape [T] or [1, T]"


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids int64 [T] on the CPU, and how many last positions' logits are kept."""

    ids: torch.Tensor
    tail: int

    @classmethod
    def of(cls, ids: TokenIds, tail: int, config: Any) -> Document:
        """A document after a check of its ids and tail.

        Args:
            config: of the model that is to read it: how many ids it knows, and how many tokens it takes.

        Raises:
            InvalidPrompt: ids that are not those of one text, that the model does not know or are more than
                it can take, or a tail as long as the prefix.
            UnsupportedModel: dynamic-NTK frequencies, and more tokens than the model's original window.
        """
        ids = id_vector(ids)
        tokens = ids.numel()
        if tokens == 0:
            raise InvalidPrompt("the prefix has no tokens", hint="give a document that is not empty")
        _check_range(ids, config)
        refuse_unstable_frequencies(config, tokens)
        window = context_window(config)
        if window is not None and tokens > window:
            raise InvalidPrompt(
                f"the prefix has {tokens:,} tokens, and the model's window is {window:,}",
                hint="use a shorter document, or a model with a longer window",
            )
        if tail < 0 or tail >= tokens:
            raise InvalidPrompt(
                f"tail={tail} does not fit a prefix of {tokens} tokens",
                hint="use a tail shorter than the prefix",
            )
        return cls(ids, tail)

    @property
    def length(self) -> int:
        """T, tokens of the document."""
        return self.ids.numel()

    @property
    def tail_positions(self) -> range:
        """Positions whose logits are kept."""
        return range(self.length - self.tail, self.length)


def id_vector(ids: TokenIds) -> torch.Tensor:
    """Token ids of one text, a list or integer tensor [T] or [1, T], as int64 [T] on the CPU.

    Raises:
        InvalidPrompt: another shape, or not integers.
    """
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidPrompt(f"not token ids: {first_line(error)}", hint=_IDS) from None
    if found.dim() != 1 and found.shape[:-1] != (1,):
        raise InvalidPrompt(f"token ids of shape {list(found.shape)} are not one text's", hint=_IDS)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.numel() and not whole:
        raise InvalidPrompt(f"token ids are integers, not {found.dtype}", hint=_IDS)
    return found.flatten().to("cpu", torch.int64)


def _check_range(ids: torch.Tensor, config: Any) -> None:
    vocabulary = config.get_text_config(decoder=True).vocab_size
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < vocabulary:
            raise InvalidPrompt(
                f"token id {token} is not among the model's {vocabulary:,}",
                hint="use the model's own tokenizer",
            )


@dataclass
class Observations:
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
        """Add a chunk's queries [documents, heads, t, D], pads left out."""
        rows = []
        for row, length in enumerate(self.lengths):
            seen = query[row, :, : max(0, length - self.start)]
            rows.append(torch.linalg.vector_norm(seen, dim=1, dtype=torch.float32).square())
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        total = torch.stack(rows)
        self.energy[layer] = self.energy[layer] + total if layer in self.energy else total

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Keep a chunk's cos and sin."""
        embeddings = arguments.get("position_embeddings")
        if embeddings is not None:
            self.tables.setdefault(int(module.layer_idx), []).append(embeddings)  # type: ignore[arg-type]


class Run:
    """A batch of documents, padded on the right, on its way through a model.

    Args:
        chunk: most tokens in one forward, or None for what suits the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inspected: InspectedModel,
        batch: list[Document],
        chunk: int | None = None,
    ) -> None:
        self.model, self.inspected, self.batch = model, inspected, batch
        self.longest = max(document.length for document in batch)
        self.fused = can_fuse_chunks(model, inspected)
        self.chunk = chunk or chunk_tokens(
            model, inspected.layout, len(batch), self.longest, fused=self.fused
        )
        self.seen = Observations([document.length for document in batch])
        self.cache = self._empty_cache()
        self.logits: list[list[torch.Tensor]] = [[] for _ in batch]
        # Windows and states come in batches of one: they are copied where that document's tail begins.
        self.tail_start = self.longest - batch[0].tail
        self.exact_at_tail: dict[int, ExactLayer] = {}
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefills(self) -> list[Prefill]:
        """Run the batch; one result per document, in order, sharing storage."""
        padded = torch.zeros(len(self.batch), self.longest, dtype=torch.int64)
        for row, document in enumerate(self.batch):
            padded[row, : document.length] = document.ids
        padded = padded.to(self.model.device)
        modules = list(self.inspected.modules.values())
        with observe(self.model, self.seen, modules, fused_chunks=self.fused):
            for start, end in self._chunks():
                self.seen.start = start
                self._forward(padded[:, start:end], start, end)
        frequencies = model_frequencies(self.model)
        return [self._result(row, frequencies) for row in range(len(self.batch))]

    def _empty_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for layer in self.inspected.layout.compressible:
            cache.layers[layer.index] = StorageLayer(self.longest)
        return cache

    def _chunks(self) -> list[tuple[int, int]]:
        """Chunk bounds; with windows or states one of them is where the tail begins."""
        change = frequency_change(self.model.config)
        first = self.chunk
        if change is not None and self.longest > change[1]:
            # Longrope looks at the last position of a forward: none may end where the short factors hold.
            first = max(first, change[1] + 1)
        bounds = {0, *range(first, self.longest, self.chunk), self.longest}
        if self.inspected.layout.exact:
            bounds.add(self.tail_start)
        ordered = sorted(bounds)
        return list(zip(ordered, ordered[1:], strict=False))

    def _forward(self, ids: torch.Tensor, start: int, end: int) -> None:
        if start == self.tail_start:
            self.exact_at_tail = self._exact_layers()
        tails = [document.tail_positions for document in self.batch]
        wanted = [position for position in range(start, end) if any(position in tail for tail in tails)]
        kept = [position - start for position in wanted] or [end - start - 1]
        extra = {"logits_to_keep": torch.tensor(kept, device=ids.device)} if self.keeps_logits else {}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra)
        logits = out.logits if self.keeps_logits else out.logits[:, kept]
        for row, tail in enumerate(tails):
            mine = [index for index, position in enumerate(wanted) if position in tail]
            if mine:
                self.logits[row].append(logits[row, mine[0] : mine[-1] + 1].float())

    def _exact_layers(self) -> dict[int, ExactLayer]:
        return {
            layer.index: copy_exact_layer(self.cache.layers[layer.index])
            for layer in self.inspected.layout.exact
        }

    def _result(self, row: int, frequencies: list[Frequencies]) -> Prefill:
        document, length = self.batch[row], self.batch[row].length
        full = [layer.index for layer in self.inspected.layout.compressible]
        storage = {index: self.cache.layers[index] for index in full}
        return Prefill(
            config=self.model.config,
            layout=self.inspected.layout,
            token_ids=document.ids,
            keys={i: storage[i].key_storage[row : row + 1, :, :length] for i in full},
            values={i: storage[i].value_storage[row : row + 1, :, :length] for i in full},
            ended=self._exact_layers(),
            at_tail=self.exact_at_tail,
            tail=document.tail,
            logits_tail=torch.cat(self.logits[row]) if document.tail else None,
            energy={index: total[row] / length for index, total in self.seen.energy.items()},
            forms=self.inspected.forms,
            tables=self._plane_tables(length),
            frequencies=frequencies,
        )

    def _plane_tables(self, length: int) -> dict[int, PlaneTables]:
        """Per full layer, cos and sin [length, P]; layers given the same tensors share the result."""
        made: dict[tuple[int, ...], PlaneTables] = {}
        tables = {}
        for index, chunks in self.seen.tables.items():
            form = self.inspected.forms[index]
            if form.planes.shape[0] == 0:
                continue
            shared = chunks[0] if isinstance(chunks[0], torch.Tensor) else chunks[0][0]
            name = (id(shared), *form.signature)
            if name not in made:
                pieces = [form.plane_tables(chunk) for chunk in chunks]
                cos = torch.cat([piece[0][0] for piece in pieces])[:length]
                sin = torch.cat([piece[1][0] for piece in pieces])[:length]
                made[name] = (cos, sin)
            tables[index] = made[name]
        return tables


def can_fuse_chunks(model: PreTrainedModel, inspected: InspectedModel) -> bool:
    """Whether CUDA's fused causal attention takes chunks that start behind position 0."""
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and all(one.head_dim == one.value_dim <= 256 for one in inspected.layout.compressible)
    )
