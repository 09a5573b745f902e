"""Token factors and layer bases of every group, read from a prefill in chunks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_artifacts.manifest import GroupLayout
from xkv_service.calibration.calibration import Calibration
from xkv_service.factorization.factorize import Factorization, factorize
from xkv_service.factorization.features import Features, features_of
from xkv_service.factorization.gram import accumulate_gram, gram_dtype
from xkv_service.factorization.quantize import quantize_columns, quantize_rows, quantize_runs
from xkv_service.factorization.weights import (
    FeatureWeights,
    metric_weights,
    output_projection,
    output_weights,
    query_weights,
)
from xkv_service.factors import GroupFactors, LowRank
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout
from xkv_service.packed_factors import PackedFactors
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.exact import low_rank_span
from xkv_service.spec import CompressionSpec
from xkv_service.stored import DTYPES, base_dtype

BATCH_CUDA = 16

_LOG = logging.getLogger(__name__)

# They depend on the model alone, so every document after the first has them for nothing.
_OUTPUT_WEIGHTS: WeakKeyDictionary[nn.Module, FeatureWeights | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class FactorizedGroups:
    """Factors of every group.

    Args:
        key_error, value_error: relative reconstruction error of each group (`Factorization.error`, or that of
            rounded factors over a calibration's bases).
        key_energy: by layer, mean square of the keys before RoPE [kv_heads, D]; rotary planes keep theirs
            when they turn. Empty where the factors were not made from Gram matrices.
    """

    groups: tuple[GroupFactors, ...]
    key_error: tuple[float, ...]
    value_error: tuple[float, ...]
    key_energy: dict[int, torch.Tensor]


def factorize_groups(
    model: PreTrainedModel,
    exact: Prefill,
    spec: CompressionSpec,
    layouts: tuple[GroupLayout, ...],
    calibration: Calibration | None = None,
) -> FactorizedGroups:
    """Factor every group's keys and values.

    On an accelerator matrices of one width are factored together (small batched products keep it busy), keys
    and values alike; on a CPU one after the other, so that only one Gram matrix is in memory.

    Args:
        calibration: whose weights are used instead of the spec's, if any.
    """
    work = _Work(model, exact, spec, calibration)
    parts = [features_of(exact, layout) for layout in layouts]
    done: dict[Features, tuple[LowRank, float]] = {}
    for batch in work.batches([part for both in parts for part in both]):
        done.update(work.factor(batch))
    keys = [done[both[0]] for both in parts]
    values = [done[both[1]] if len(both) > 1 else (None, 0.0) for both in parts]
    return FactorizedGroups(
        tuple(
            GroupFactors(*one)
            for one in zip(layouts, [k for k, _ in keys], [v for v, _ in values], strict=True)
        ),
        tuple(error for _, error in keys),
        tuple(error for _, error in values),
        work.key_energy,
    )


class _Work:
    """One prefill under factorization."""

    def __init__(
        self, model: PreTrainedModel, exact: Prefill, spec: CompressionSpec, calibration: Calibration | None
    ) -> None:
        self.exact, self.spec, self.calibration = exact, spec, calibration
        self.device = exact.device
        self.modules = inspect_loaded(model).modules
        self.layers = {layer.index: layer for layer in exact.layout.compressible}
        self.key_energy: dict[int, torch.Tensor] = {}

    def batches(self, parts: Sequence[Features]) -> list[list[Features]]:
        """Parts to factor together."""
        by_width: dict[int, list[Features]] = {}
        for part in parts:
            by_width.setdefault(sum(part.widths), []).append(part)
        size = 1 if self.device.type == "cpu" else BATCH_CUDA
        return [same[i : i + size] for same in by_width.values() for i in range(0, len(same), size)]

    def factor(self, batch: list[Features]) -> dict[Features, tuple[LowRank, float]]:
        """Factors and relative error of each part; all are of one width."""
        width = sum(batch[0].widths)
        dtype = gram_dtype(batch[0].product_dtype)
        grams = torch.zeros(len(batch), width, width, dtype=dtype, device=self.device)
        for gram, part in zip(grams, batch, strict=True):
            self._gram(part, gram)
        weights = [self._weights(part) for part in batch]
        results = factorize(grams, [part.rank for part in batch], weights, self._known(batch))
        del grams
        return {
            part: (self._low_rank(part, result), result.error)
            for part, result in zip(batch, results, strict=True)
        }

    def _gram(self, part: Features, out: torch.Tensor) -> None:
        """XᵀX over the tokens that are not kept exact anyway, where there are any."""
        span = low_rank_span(self.exact.tokens, self.spec)
        accumulate_gram(
            part.read,
            part.widths,
            span,
            chunk_tokens=part.chunk_tokens,
            dtype=part.product_dtype,
            device=self.device,
            out=out,
        )
        if part.kind == "key":
            self._note_energy(part.layout, out.diagonal() / (span[1] - span[0]))

    def _note_energy(self, layout: GroupLayout, energy: torch.Tensor) -> None:
        parts = torch.split(energy, list(layout.key_widths))
        for layer, heads, part in zip(layout.layers, layout.kv_heads, parts, strict=True):
            self.key_energy[layer] = part.reshape(heads, -1).clone()

    def _weights(self, part: Features) -> list[FeatureWeights] | None:
        """One weight per layer, or None when none is asked for or a layer has no output projection."""
        layers = [self.layers[index] for index in part.layout.layers]
        if self.calibration is not None:
            basis = self.calibration.group_of(part.layout.layers).basis(part.kind)
            return [metric_weights(one) for one in basis.on(self.device).metric]
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

    def _known(self, batch: list[Features]) -> list[torch.Tensor]:
        """The calibration's bases of each part, if there is a calibration."""
        if self.calibration is None:
            return []
        groups = [self.calibration.group_of(part.layout.layers).basis(part.kind) for part in batch]
        return [basis.on(self.device).bases for basis in groups]

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

    def _low_rank(self, part: Features, result: Factorization) -> LowRank:
        """A = X P and B, in the dtypes they are stored in."""
        factors, bases = part.project(result.projection), result.bases
        span = slice(*low_rank_span(self.exact.tokens, self.spec))
        stored: torch.Tensor | PackedFactors
        if part.runs:
            stored, scales = quantize_runs(factors, part.runs, span)
            bases = bases * scales[:, None]
        elif self.spec.factor_dtype == "int8":
            stored, scales = quantize_columns(factors, span)
            bases = bases * scales[:, None]
        else:
            stored = factors.to(DTYPES[self.spec.factor_dtype])
        if self.spec.base_dtype is None:
            return LowRank(stored, bases.to(base_dtype(self.spec)), part.widths)
        integers, scales = quantize_rows(bases)
        return LowRank(stored, integers, part.widths, scales)
