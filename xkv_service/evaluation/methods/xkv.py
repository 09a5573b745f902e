"""xKV (arXiv 2503.18893): the factors of this project, rebuilt whole or selected from while decoding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xkv_service.calibration.choice import reuse_of
from xkv_service.calibration.storage import check_made_for, read_identified
from xkv_service.compression import factorize_prefill, rotary_tables
from xkv_service.decoding.cache import XKVCache
from xkv_service.errors import InvalidSpec
from xkv_service.factorization.ranks import size_of
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.model_files import identity_of
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.reconstruct import dense_cache
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec

_FACTORS: WeakKeyDictionary[Prefill, dict[CompressionSpec, PrefixFactors]] = WeakKeyDictionary()
"""Factors of prefills still in use: methods that differ in their selection alone share them."""


class XKV:
    """Keep the factors of groups of layers, as `xkv precompute` stores them; the options are its spec's.

    Args:
        group: adjacent layers that share token factors; 1 is a truncated SVD of each layer alone.
        calibration: a calibration's file, which then decides groups, ranks, weights, bits and planes.
        basis: whose layer bases, with a calibration: "calibrated", or the "document"'s own.
        reuse: layers that attend to what the one before them chose: those of the calibration, or none.
        ratio: bytes of the exact cache / bytes stored, everything counted.
        index: the selection index: "sketch", "derived" (a sketch made when it is needed, nothing stored),
            "landmark" or "none". Left out: as `CompressionSpec` has it, a sketch up to 8x, derived above.
        factors: dtype of the token factors; with a calibration "mixed", "int4" or "int8".
        bases: dtype of the document's own bases: "int8", with a scale a row, or "bfloat16".
        key_share: share of keys in the ranks.
        key_weights, value_weights: see `CompressionSpec`.
        planes: rotary planes in a key sketch.
        sink, recent, outliers: first tokens, last tokens and outlier chunks kept exact.
        selector: "none" rebuilds every token into an ordinary cache before the question comes. Any other
            decodes from the factors, and selects by what it names (see `SelectionSpec`).
        budget: tokens selected, or a share of the prefix; by default `SelectionSpec`'s.
        granularity: one selection for a "layer", or for each KV "head".
        last: last tokens of the prefix that are rebuilt always, beside the budget, by default
            `SelectionSpec`'s; they cost no bytes.

    Raises:
        InvalidSpec: an option is out of range, or a budget without a selector.
    """

    name = "xkv"

    def __init__(
        self,
        group: int = 4,
        ratio: float = 8.0,
        index: Literal["sketch", "derived", "landmark", "none"] | None = None,
        factors: Literal["mixed", "int4", "int8", "bfloat16", "float16", "float32"] = "int8",
        key_share: float = 0.4,
        key_weights: Literal["none", "query"] = "none",
        value_weights: Literal["none", "output"] = "none",
        planes: int = 8,
        sink: int = 4,
        recent: int = 0,
        outliers: int = 0,
        selector: Literal["none", "auto", "sketch", "landmark", "exact", "dense"] = "none",
        budget: int | float | None = None,
        granularity: Literal["layer", "head"] = "layer",
        last: int | None = None,
        calibration: str | None = None,
        basis: Literal["document", "calibrated"] = "document",
        bases: Literal["int8", "bfloat16"] = "bfloat16",
        reuse: Literal["calibrated", "none"] = "calibrated",
    ) -> None:
        found = None if calibration is None else read_identified(Path(calibration))
        self._made_for = found[0] if found else None
        self.calibration = found[1] if found else None
        self._fitting: WeakSet[PreTrainedModel] = WeakSet()
        reuses = self.calibration is not None and reuse == "calibrated" and index != "none" and not outliers
        self.spec = CompressionSpec(
            group_size=group,
            ratio=ratio,
            key_share=key_share,
            factor_dtype=factors,
            index=index,
            sketch_planes=planes,
            sink=sink,
            recent=recent,
            outlier_chunks=outliers,
            key_weights=key_weights,
            value_weights=value_weights,
            calibration=self.calibration.id if self.calibration else None,
            basis=basis,
            base_dtype=None if bases == "bfloat16" else bases,
            reuse=reuse_of(self.calibration) if self.calibration and reuses else (),
        )
        self.selection = _selection(selector, budget, granularity, last)
        made = "sketch" if self.spec.index == "derived" else self.spec.index
        if selector in ("sketch", "landmark") and selector != made:
            raise InvalidSpec(f"selector={selector} needs its index", hint=f"give index={selector}")

    def prepare(self, model: PreTrainedModel, exact: Prefill) -> FactorPrefix:
        """Factorize the prefill.

        Raises:
            RatioUnreachable: the ratio leaves no byte for factors of a prefix this short.
            ModelMismatch: the calibration was made for another model's weights, tokenizer or dtype.
        """
        self._check_model(model)
        known = _FACTORS.setdefault(exact, {})
        if self.spec not in known:
            known[self.spec] = factorize_prefill(model, exact, self.spec, self.calibration)[0]
        size = size_of(exact.layout, exact.tokens, self.spec, rotary_tables(exact)[1], self.calibration)
        return FactorPrefix(model, known[self.spec], size.bytes_stored, self.selection)

    def _check_model(self, model: PreTrainedModel) -> None:
        if self._made_for is None or self.calibration is None or model in self._fitting:
            return
        found = identity_of(model)
        if found is not None:
            check_made_for(self.calibration.id, self._made_for, found)
        self._fitting.add(model)


def _selection(
    selector: Any, budget: int | float | None, granularity: Any, last: int | None
) -> SelectionSpec | None:
    if selector == "none":
        if budget is not None or last is not None:
            raise InvalidSpec(
                f"budget={budget}, last={last}: nothing is selected", hint="give a selector, say sketch"
            )
        return None
    wanted = SelectionSpec.budget if budget is None else budget
    return SelectionSpec(selector, wanted, granularity, recent=SelectionSpec.recent if last is None else last)


@dataclass(frozen=True, eq=False)
class FactorPrefix:
    """A prefix as factors.

    Args:
        model: reads the caches. factors: of the prefix.
        nbytes: of the file, at most: every tensor and an allowance for the header.
        selection: how tokens are chosen while decoding, or None to rebuild all of them beforehand.
    """

    model: PreTrainedModel
    factors: PrefixFactors
    nbytes: int
    selection: SelectionSpec | None

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""
        return self.factors.tokens

    def cache(self) -> Cache:
        """An ordinary cache of the rebuilt keys and values, or a cache of the factors."""
        if self.selection is not None:
            return XKVCache.from_factors(self.model, self.factors, self.selection)
        taken = copy.copy(self._rebuilt)
        taken.layers = [_fork(layer) for layer in self._rebuilt.layers]
        return taken

    @cached_property
    def _rebuilt(self) -> DynamicCache:
        return dense_cache(self.model, self.factors)


def _fork(layer: Any) -> Any:
    """A layer that goes on by itself: these two grow by making new tensors, so theirs need no copy."""
    shared = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    return copy.copy(layer) if shared else copy.deepcopy(layer)
