"""Token factors and layer bases of every group, read from a prefill in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from xkv_artifacts.manifest import GroupLayout
from xkv_service.exact import always_exact
from xkv_service.factorize import Factorization, factorize
from xkv_service.factors import GroupFactors, LowRank
from xkv_service.gram import accumulate_gram, fill_rows, gram_dtype, product_dtype
from xkv_service.inspect import inspect_loaded
from xkv_service.layout import LayerLayout
from xkv_service.prefilled import Prefill
from xkv_service.spec import CompressionSpec
from xkv_service.stored import DTYPES
from xkv_service.weights import FeatureWeights, output_projection, output_weights, query_weights

CHUNK_TOKENS_CPU = 2048
CHUNK_TOKENS_CUDA = 8192

Kind = Literal["key", "value"]


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

    On an accelerator all groups of one shape are factored at once (small batched products keep it busy); on a
    CPU one after the other, so that only one group's Gram matrix is in memory.
    """
    work = _Work(model, exact, spec)
    keys = work.factor_all("key", layouts)
    values = work.factor_all("value", layouts)
    return FactorizedGroups(
        tuple(GroupFactors(layout, keys[i][0], values[i][0]) for i, layout in enumerate(layouts)),
        tuple(keys[i][1] for i in range(len(layouts))),
        tuple(values[i][1] for i in range(len(layouts))),
        work.key_energy,
    )


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

    def factor_all(self, kind: Kind, layouts: tuple[GroupLayout, ...]) -> dict[int, tuple[LowRank, float]]:
        """Factors and error of each group, by its number."""
        done: dict[int, tuple[LowRank, float]] = {}
        for numbers in self._batches(kind, layouts):
            batch = [layouts[number] for number in numbers]
            width = sum(_widths(kind, batch[0]))
            grams = torch.zeros(len(batch), width, width, dtype=gram_dtype(self.device), device=self.device)
            for gram, layout in zip(grams, batch, strict=True):
                self._gram(kind, layout, gram)
            weights = [self._weights(kind, layout) for layout in batch]
            results = factorize(grams, _rank(kind, batch[0]), weights)
            del grams
            for number, layout, result in zip(numbers, batch, results, strict=True):
                done[number] = (self._low_rank(kind, layout, result), result.error)
        return done

    def _batches(self, kind: Kind, layouts: tuple[GroupLayout, ...]) -> list[list[int]]:
        if self.on_cpu:
            return [[number] for number in range(len(layouts))]
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, layout in enumerate(layouts):
            shapes.setdefault((sum(_widths(kind, layout)), _rank(kind, layout)), []).append(number)
        return list(shapes.values())

    def _gram(self, kind: Kind, layout: GroupLayout, out: torch.Tensor) -> None:
        """XᵀX over the tokens that are not kept exact anyway, where there are any."""
        sink, recent = always_exact(self.exact.tokens, self.spec)
        span = (sink, recent) if recent > sink else (0, self.exact.tokens)
        accumulate_gram(
            self._reader(kind, layout),
            _widths(kind, layout),
            span,
            chunk_tokens=self.chunk,
            dtype=product_dtype(self._cached_dtype(kind, layout), self.device),
            device=self.device,
            out=out,
        )
        if kind == "key":
            self._note_energy(layout, out.diagonal() / (span[1] - span[0]))

    def _note_energy(self, layout: GroupLayout, energy: torch.Tensor) -> None:
        parts = torch.split(energy, list(layout.key_widths))
        for layer, heads, part in zip(layout.layers, layout.kv_heads, parts, strict=True):
            self.key_energy[layer] = part.reshape(heads, -1).clone()

    def _reader(self, kind: Kind, layout: GroupLayout) -> Callable[[int, int, int], torch.Tensor]:
        read = self.exact.keys if kind == "key" else self.exact.values
        return lambda position, start, stop: read(layout.layers[position], start, stop)

    def _cached_dtype(self, kind: Kind, layout: GroupLayout) -> torch.dtype:
        read = self.exact.rotated_keys if kind == "key" else self.exact.values
        return read(layout.layers[0], 0, 1).dtype

    def _weights(self, kind: Kind, layout: GroupLayout) -> list[FeatureWeights] | None:
        """One weight per layer, or None when the spec asks for none or a layer has no output projection."""
        layers = [self.layers[index] for index in layout.layers]
        if kind == "key" and self.spec.key_weights == "query":
            return [self._query_weights(layer) for layer in layers]
        if kind == "value" and self.spec.value_weights == "output":
            found = [self._output_weights(layer) for layer in layers]
            known = [weight for weight in found if weight is not None]
            return known if len(known) == len(found) else None
        return None

    def _query_weights(self, layer: LayerLayout) -> FeatureWeights:
        energy = self.exact.query_energy(layer.index)
        return query_weights(energy, self.exact.planes(layer.index), layer.kv_heads)

    def _output_weights(self, layer: LayerLayout) -> FeatureWeights | None:
        module = self.modules[layer.index]
        projection = output_projection(module, layer.query_heads * layer.value_dim)
        return None if projection is None else output_weights(projection, layer.query_heads, layer.kv_heads)

    def _low_rank(self, kind: Kind, layout: GroupLayout, result: Factorization) -> LowRank:
        """A = X P in chunks, and B, in the stored dtype."""
        widths, dtype = _widths(kind, layout), DTYPES[self.spec.dtype]
        product = self._projection_dtype(kind, layout)
        projection = result.projection.to(product)
        read, tokens = self._reader(kind, layout), self.exact.tokens
        factors = torch.empty(tokens, projection.shape[1], dtype=dtype, device=self.device)
        buffer = torch.empty(min(self.chunk, tokens), sum(widths), dtype=product, device=self.device)
        for start in range(0, tokens, self.chunk):
            stop = min(start + self.chunk, tokens)
            factors[start:stop] = _product(fill_rows(buffer, read, widths, start, stop), projection)
        return LowRank(factors, result.bases.to(dtype), widths)

    def _projection_dtype(self, kind: Kind, layout: GroupLayout) -> torch.dtype:
        if self.on_cpu:
            return torch.float32
        return product_dtype(self._cached_dtype(kind, layout), self.device)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, summed and returned in float32 where the inputs have 16 bits."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype.itemsize == 2 else left @ right


def _widths(kind: Kind, layout: GroupLayout) -> tuple[int, ...]:
    return layout.key_widths if kind == "key" else layout.value_widths


def _rank(kind: Kind, layout: GroupLayout) -> int:
    return layout.rank_k if kind == "key" else layout.rank_v
