"""Token factors and layer bases of every group, read from a prefill in chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_artifacts.manifest import GroupLayout
from xkv_service.factorization.factorize import Factorization, factorize
from xkv_service.factorization.gram import accumulate_gram, fill_rows, gram_dtype, product_dtype
from xkv_service.factorization.quantize import quantize_columns
from xkv_service.factorization.subspace import precise_products
from xkv_service.factorization.weights import FeatureWeights, output_projection, output_weights, query_weights
from xkv_service.factors import GroupFactors, LowRank
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.exact import low_rank_span
from xkv_service.spec import CompressionSpec
from xkv_service.stored import DTYPES

CHUNK_TOKENS_CPU = 2048
CHUNK_TOKENS_CUDA = 32768
BATCH_CUDA = 16

_LOG = logging.getLogger(__name__)

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = ("key", "value")

# They depend on the model alone, so every document after the first has them for nothing.
_OUTPUT_WEIGHTS: WeakKeyDictionary[nn.Module, FeatureWeights | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class FactorizedGroups:
    """Factors of every group.

    Args:
        key_error, value_error: relative reconstruction error of each group (`Factorization.error`).
        key_energy: by layer, mean square of the keys before RoPE [kv_heads, D]; rotary planes keep theirs
            when they turn.
    """

    groups: tuple[GroupFactors, ...]
    key_error: tuple[float, ...]
    value_error: tuple[float, ...]
    key_energy: dict[int, torch.Tensor]


def factorize_groups(
    model: PreTrainedModel, exact: Prefill, spec: CompressionSpec, layouts: tuple[GroupLayout, ...]
) -> FactorizedGroups:
    """Factor every group's keys and values.

    On an accelerator matrices of one width are factored together (small batched products keep it busy), keys
    and values alike; on a CPU one after the other, so that only one Gram matrix is in memory.
    """
    work = _Work(model, exact, spec)
    done: dict[_Part, tuple[LowRank, float]] = {}
    for batch in work.batches([_Part(kind, layout) for layout in layouts for kind in _kinds(layout)]):
        done.update(work.factor(batch))
    keys = [done[_Part("key", layout)] for layout in layouts]
    values = [done.get(_Part("value", layout), (None, 0.0)) for layout in layouts]
    return FactorizedGroups(
        tuple(
            GroupFactors(*one)
            for one in zip(layouts, [k for k, _ in keys], [v for v, _ in values], strict=True)
        ),
        tuple(error for _, error in keys),
        tuple(error for _, error in values),
        work.key_energy,
    )


def _kinds(layout: GroupLayout) -> tuple[Kind, ...]:
    """Latents (MLA) are keys without values."""
    return ("key",) if layout.latent else KINDS


@dataclass(frozen=True)
class _Part:
    """The keys or the values of one group."""

    kind: Kind
    layout: GroupLayout

    @property
    def widths(self) -> tuple[int, ...]:
        return self.layout.key_widths if self.kind == "key" else self.layout.value_widths

    @property
    def rank(self) -> int:
        return self.layout.rank_k if self.kind == "key" else self.layout.rank_v


class _Work:
    """One prefill under factorization."""

    def __init__(self, model: PreTrainedModel, exact: Prefill, spec: CompressionSpec) -> None:
        self.exact, self.spec = exact, spec
        self.device = exact.device
        self.on_cpu = self.device.type == "cpu"
        self.chunk = CHUNK_TOKENS_CPU if self.on_cpu else CHUNK_TOKENS_CUDA
        self.modules = inspect_loaded(model).modules
        self.layers = {layer.index: layer for layer in exact.layout.compressible}
        self.key_energy: dict[int, torch.Tensor] = {}

    def batches(self, parts: list[_Part]) -> list[list[_Part]]:
        """Parts to factor together."""
        by_width: dict[int, list[_Part]] = {}
        for part in parts:
            by_width.setdefault(sum(part.widths), []).append(part)
        size = 1 if self.on_cpu else BATCH_CUDA
        return [same[i : i + size] for same in by_width.values() for i in range(0, len(same), size)]

    def factor(self, batch: list[_Part]) -> dict[_Part, tuple[LowRank, float]]:
        """Factors and relative error of each part; all are of one width."""
        width = sum(batch[0].widths)
        dtype = gram_dtype(self._product_dtype(batch[0]))
        grams = torch.zeros(len(batch), width, width, dtype=dtype, device=self.device)
        for gram, part in zip(grams, batch, strict=True):
            self._gram(part, gram)
        results = factorize(grams, [part.rank for part in batch], [self._weights(part) for part in batch])
        del grams
        return {
            part: (self._low_rank(part, result), result.error)
            for part, result in zip(batch, results, strict=True)
        }

    def _gram(self, part: _Part, out: torch.Tensor) -> None:
        """XᵀX over the tokens that are not kept exact anyway, where there are any."""
        span = low_rank_span(self.exact.tokens, self.spec)
        accumulate_gram(
            self._reader(part),
            part.widths,
            span,
            chunk_tokens=self.chunk,
            dtype=self._product_dtype(part),
            device=self.device,
            out=out,
        )
        if part.kind == "key":
            self._note_energy(part.layout, out.diagonal() / (span[1] - span[0]))

    def _note_energy(self, layout: GroupLayout, energy: torch.Tensor) -> None:
        parts = torch.split(energy, list(layout.key_widths))
        for layer, heads, part in zip(layout.layers, layout.kv_heads, parts, strict=True):
            self.key_energy[layer] = part.reshape(heads, -1).clone()

    def _reader(self, part: _Part) -> Callable[[int, int, int], torch.Tensor]:
        read = self.exact.values
        if part.kind == "key":
            read = partial(self.exact.keys, dtype=self._read_dtype(part))
        return lambda position, start, stop: read(part.layout.layers[position], start, stop)

    def _read_dtype(self, part: _Part) -> torch.dtype:
        """Features need no more than float32 before they are multiplied."""
        return min(self._product_dtype(part), torch.float32, key=lambda dtype: dtype.itemsize)

    def _product_dtype(self, part: _Part) -> torch.dtype:
        read = self.exact.rotated_keys if part.kind == "key" else self.exact.values
        return product_dtype(read(part.layout.layers[0], 0, 1).dtype, self.device)

    def _weights(self, part: _Part) -> list[FeatureWeights] | None:
        """One weight per layer, or None when the spec asks for none or a layer has no output projection."""
        layers = [self.layers[index] for index in part.layout.layers]
        if part.layout.latent:  # queries do not meet latents, but what these expand to
            return None
        if part.kind == "key" and self.spec.key_weights == "query":
            return [self._query_weights(layer) for layer in layers]
        if part.kind == "value" and self.spec.value_weights == "output":
            found = [self._output_weights(layer) for layer in layers]
            known = [weight for weight in found if weight is not None]
            if len(known) == len(found):
                return known
            _LOG.warning("layers %s: no output projection found, values are not weighted", part.layout.layers)
        return None

    def _query_weights(self, layer: LayerLayout) -> FeatureWeights:
        energy = self.exact.query_energy(layer.index)
        return query_weights(energy, self.exact.planes(layer.index), layer.kv_heads)

    def _output_weights(self, layer: LayerLayout) -> FeatureWeights | None:
        module = self.modules[layer.index]
        if module not in _OUTPUT_WEIGHTS:
            projection = output_projection(module, layer.query_heads * layer.value_dim)
            _OUTPUT_WEIGHTS[module] = (
                None if projection is None else output_weights(projection, layer.query_heads, layer.kv_heads)
            )
        return _OUTPUT_WEIGHTS[module]

    def _low_rank(self, part: _Part, result: Factorization) -> LowRank:
        """A = X P in chunks, and B, in the stored dtype."""
        widths = part.widths
        product = self._read_dtype(part)
        projection = result.projection.to(product)
        read, tokens = self._reader(part), self.exact.tokens
        factors = torch.empty(tokens, projection.shape[1], dtype=torch.float32, device=self.device)
        buffer = torch.empty(min(self.chunk, tokens), sum(widths), dtype=product, device=self.device)
        with precise_products():
            for start in range(0, tokens, self.chunk):
                stop = min(start + self.chunk, tokens)
                factors[start:stop] = _product(fill_rows(buffer, read, widths, start, stop), projection)
        return self._rounded(factors, result.bases, widths)

    def _rounded(self, factors: torch.Tensor, bases: torch.Tensor, widths: tuple[int, ...]) -> LowRank:
        """A and B in the dtypes they are stored in."""
        dtype, factor_dtype = DTYPES[self.spec.dtype], DTYPES[self.spec.factor_dtype]
        if factor_dtype != torch.int8:
            return LowRank(factors.to(factor_dtype), bases.to(dtype), widths)
        integers, scales = quantize_columns(factors, slice(*low_rank_span(self.exact.tokens, self.spec)))
        return LowRank(integers, (bases * scales[:, None]).to(dtype), widths)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, summed and returned in float32 where the inputs have 16 bits."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype.itemsize == 2 else left @ right
