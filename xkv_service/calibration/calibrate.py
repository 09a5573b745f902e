"""Calibrate: from a sample of documents to shared bases, each choice kept where validation says so.

1. Moments of every document's keys and values (they add up; documents stream by).
2. What error each layer stands (`tolerance`), on a few documents.
3. Groups, metric and bases; each choice is tried on documents that the bases were not made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.calibration.allocation import Offers, least_cost
from xkv_service.calibration.bases import Metric, group_energies, shared_group
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.calibration.certificates import calibrated_spec, fidelity_thresholds
from xkv_service.calibration.figures import plans, spectra
from xkv_service.calibration.likeness import layer_likeness
from xkv_service.calibration.metrics import WEIGHTINGS, Metrics, Weighting
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.partition import partition
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions
from xkv_service.calibration.tolerance import SHARES, Tolerances, measure, no_tolerances
from xkv_service.calibration.validation import Candidate, Outcome, validate
from xkv_service.errors import InvalidSpec, UnsupportedModel
from xkv_service.factorization.weights import output_metric, output_projection, plane_energy
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.modeling.observation import observe
from xkv_service.packed_factors import BITS, rank_of
from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.sketch import candidate_planes, choose_planes
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec

Observe = Callable[[str], None]
_SMALL_WIDTH = 8192


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. Defaults: docs/calibration.md.

    Args:
        ratio: bytes of the exact cache / bytes stored at which choices are made.
        ratios: at which the result is validated besides.
        group_size: most neighbours that share token factors.
        weightings: metrics to try.
        tolerance_documents: documents that tolerances are measured on.
        held_out: share of the documents that choices are tried on and bases are not made from.
        most_ratio: the ratio whose plan decides how many directions are kept: lower ones get more bits for
            the same directions.
        selection: how tokens are chosen while decoding in every trial.
    """

    ratio: float = 48.0
    ratios: tuple[float, ...] = (8.0, 20.0, 32.0, 48.0)
    group_size: int = 4
    weightings: tuple[Weighting, ...] = WEIGHTINGS
    tolerance_documents: int = 3
    held_out: float = 0.25
    most_ratio: float = 12.0
    selection: SelectionSpec = field(default_factory=SelectionSpec)

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.group_size < 1 or self.ratio < 1 or not self.weightings:
            raise InvalidSpec(
                f"held_out={self.held_out}, group_size={self.group_size}, ratio={self.ratio}: out of range",
                hint="use a share between 0 and 1, a size and a ratio from 1",
            )


@dataclass
class Observed:
    """What one pass over the sample leaves. Parts of a sample add up.

    Args:
        moments: of keys and values.
        queries: by position, float64 [query_heads, D], summed squares of the probes' rotated queries.
        query_tokens: how many. planes: by position, candidate planes int64 [n, 2].
    """

    moments: Moments
    queries: list[torch.Tensor]
    query_tokens: int
    planes: list[torch.Tensor]

    @classmethod
    def nothing(cls, model: PreTrainedModel, reach: int) -> Observed:
        """Before the first document.

        Raises:
            UnsupportedModel: latent attention, which has no calibration.
        """
        layers = calibrated_layers(inspect_loaded(model).layout)
        queries = [
            torch.zeros(one.query_heads, one.head_dim, dtype=torch.float64, device=model.device)
            for one in layers
        ]
        return cls(Moments.empty(layers, reach, model.device), queries, 0, [])

    def add(self, other: Observed) -> None:
        """Add what was observed of other documents of the same model."""
        self.moments.add(other.moments)
        for mine, more in zip(self.queries, other.queries, strict=True):
            mine += more
        self.query_tokens += other.query_tokens
        self.planes = self.planes or other.planes


def calibrated_layers(layout: ModelLayout) -> tuple[LayerLayout, ...]:
    """The layers that a calibration is about.

    Raises:
        UnsupportedModel: some have latent attention.
    """
    if any(layer.kind == "latent" for layer in layout.compressible):
        raise UnsupportedModel(
            "latent attention (MLA) has no calibration yet", hint="compress without one: --calibration none"
        )
    return layout.compressible


def reach_of(layout: ModelLayout, settings: CalibrationSettings) -> int:
    """Neighbours whose products are kept: all in a small model, so that every pair can be compared."""
    layers = calibrated_layers(layout)
    if sum(layer.key_width + layer.value_width for layer in layers) <= _SMALL_WIDTH:
        return len(layers) - 1
    return min(settings.group_size, len(layers)) - 1


@torch.no_grad()
def observe_document(model: PreTrainedModel, document: ProbedPrefix, found: Observed) -> None:
    """Add one document to what is observed.

    Raises:
        InvalidPrompt, UnsupportedModel: the model cannot run it.
    """
    exact = prefill(model, torch.tensor(document.token_ids))
    try:
        found.moments.observe(exact, CompressionSpec.sink)
        found.planes = found.planes or [
            candidate_planes(exact.planes(layer.index), layer.head_dim) for layer in found.moments.layers
        ]
        watcher = _Queries(found)
        with observe(model, watcher, []):
            predictions(model, exact_cache(exact), document.probes)
        found.query_tokens += sum(len(probe.token_ids) for probe in document.probes)
    finally:
        exact.free()


class _Queries:
    """Sums the squares of the queries of the observed layers."""

    def __init__(self, found: Observed) -> None:
        self._place = {layer.index: place for place, layer in enumerate(found.moments.layers)}
        self._sums = found.queries

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        place = self._place.get(int(module.layer_idx))  # type: ignore[arg-type]
        if place is not None:
            self._sums[place] += query[0].double().square().sum(1)

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Nothing."""


def split(
    sample: Sequence[ProbedPrefix], settings: CalibrationSettings
) -> tuple[list[ProbedPrefix], list[ProbedPrefix]]:
    """(documents that bases are made from, documents that choices are tried on).

    Raises:
        InvalidSpec: fewer than two documents.
    """
    if len(sample) < 2:
        raise InvalidSpec(
            f"a calibration needs 2 documents at least, this sample has {len(sample)}",
            hint="give more documents: one in four is kept to check the result on",
        )
    step = max(2, round(1 / settings.held_out))
    held = list(sample[step - 1 :: step]) or [sample[-1]]
    return [one for one in sample if one not in held], held


def calibrate(
    model: PreTrainedModel,
    sample: Sequence[ProbedPrefix],
    settings: CalibrationSettings | None = None,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Calibrate one model in this process.

    Args:
        model: a supported model whose layers have full attention (or windows and states beside it).
        sample: documents like those that will be compressed, with probes.
        observer: told what is being done.

    Raises:
        InvalidSpec: too few documents, or a setting out of range.
        UnsupportedModel: latent attention, or a model whose cache cannot be compressed.
    """
    settings = settings or CalibrationSettings()
    used, held = split(sample, settings)
    found = Observed.nothing(model, reach_of(inspect_loaded(model).layout, settings))
    for number, document in enumerate(used, 1):
        observer(f"moments {number}/{len(used)}: {document.name}")
        observe_document(model, document, found)
    return decide(model, found, used, held, settings, observer)


@torch.no_grad()
def decide(
    model: PreTrainedModel,
    found: Observed,
    used: Sequence[ProbedPrefix],
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Everything after the moments: tolerances, groups, metric, bases, validation."""
    tolerances = no_tolerances(found.moments)
    probed = used[: settings.tolerance_documents]
    for number, document in enumerate(probed, 1):
        observer(f"tolerances {number}/{len(probed)}: {document.name}")
        exact = prefill(model, torch.tensor(document.token_ids))
        measure(model, exact, document.probes, found.moments, tolerances, 1 / len(probed))
        exact.free()
    maker = _Maker(model, found, tolerances, settings)
    observer(f"trying {len(settings.weightings)} metrics on {len(held)} documents")
    tried = {one: maker.calibration(one, maker.fixed_groups()) for one in settings.weightings}
    metrics = _validated(model, held, settings, dict(tried))
    weighting = min(settings.weightings, key=lambda one: metrics[one].kl)
    chosen = maker.best_groups(weighting)
    options = {"fixed": tried[weighting], "chosen": maker.calibration(weighting, chosen)}
    observer(f"trying groups {chosen} on {len(held)} documents")
    groups = _validated(model, held, settings, options)
    best = options["chosen"] if groups["chosen"].kl < groups["fixed"].kl else options["fixed"]
    observer(f"validating at {', '.join(f'{one:g}x' for one in settings.ratios)}")
    figures = {
        "settings": asdict(settings),
        "sample": {
            "documents": len(used), "held_out": len(held), "tokens": found.moments.tokens,
            "probes": sum(len(one.probes) for one in held),
        },
        "weighting": weighting,
        "groups": [list(group.layers) for group in best.groups],
        "metrics": {name: one.as_dict() for name, one in metrics.items()},
        "partition": {name: one.as_dict() for name, one in groups.items()},
        "tolerances": _tolerance_figures(tolerances, found.moments),
        "validation": _validation(model, held, settings, best),
        "likeness": layer_likeness(found.moments),
        "plans": plans(best, settings.ratios, maker.bits_full),
        "spectra": spectra(found.moments),
        "thresholds": fidelity_thresholds(model, held, settings.ratios, best),
    }  # fmt: skip
    return replace(best, figures=figures)


class _Maker:
    """Makes calibrations of one set of moments."""

    def __init__(
        self, model: PreTrainedModel, found: Observed, tolerances: Tolerances, settings: CalibrationSettings
    ) -> None:
        self.found, self.settings = found, settings
        self.moments = found.moments
        self.layers = found.moments.layers
        queries = [self._query_metric(place) for place in range(len(self.layers))]
        modules = inspect_loaded(model).modules
        outputs = [_output_metric(modules[layer.index], layer) for layer in self.layers]
        self.metrics = Metrics(self.moments, tolerances, queries, outputs)

    def fixed_groups(self) -> list[tuple[int, int]]:
        """(first, count) of groups of the same size, as the paper has them."""
        size, count = self.settings.group_size, len(self.layers)
        return [(first, min(size, count - first)) for first in range(0, count, size)]

    def best_groups(self, weighting: Weighting) -> list[tuple[int, int]]:
        """The partition of least cost at the price that bits have at the settings' ratio."""
        metric = self.metrics.of(weighting)
        fixed = [energies for group in self.fixed_groups() for energies in self._energies(metric, *group)]
        price = Offers(fixed, BITS).price(self._bits_per_token(self.settings.ratio))

        def cost(first: int, count: int) -> float:
            return sum(least_cost(one, price, BITS) for one in self._energies(metric, first, count))

        return partition(len(self.layers), self.settings.group_size, cost)

    def calibration(self, weighting: Weighting, groups: Sequence[tuple[int, int]]) -> Calibration:
        """Bases of the groups in a metric."""
        metric = self.metrics.of(weighting)
        made = [shared_group(self.moments, first, count, metric) for first, count in groups]
        energies = [group.basis(kind).energies for group in made for kind in KINDS]
        runs = Offers(energies, BITS).runs(self._bits_per_token(self.settings.most_ratio))
        ranks = [rank_of(one) for one in runs]
        kept = [
            group.leading(*pair)
            for group, pair in zip(made, zip(ranks[::2], ranks[1::2], strict=True), strict=True)
        ]
        planes = {layer.index: self._planes(place) for place, layer in enumerate(self.layers)}
        return Calibration(tuple(kept), planes, id="candidate")

    def _energies(self, metric: Metric, first: int, count: int) -> list[torch.Tensor]:
        return [group_energies(self.moments, kind, first, count, metric) for kind in KINDS]

    @property
    def bits_full(self) -> int:
        """Bits of a token in the exact cache of these layers."""
        return sum(16 * (layer.key_width + layer.value_width) for layer in self.layers)

    def _bits_per_token(self, ratio: float) -> float:
        return self.bits_full / ratio

    def _planes(self, place: int) -> torch.Tensor:
        candidates = self.found.planes[place]
        energy = self.moments.energy("key", place)
        return choose_planes(energy, self._query_energy(place), candidates, len(candidates)).cpu()

    def _query_energy(self, place: int) -> torch.Tensor:
        return self.found.queries[place] / max(1, self.found.query_tokens)

    def _query_metric(self, place: int) -> torch.Tensor:
        energy = plane_energy(
            self._query_energy(place), self.found.planes[place], self.layers[place].kv_heads
        )
        return torch.diag_embed(energy + _FLOOR * energy.mean())


_FLOOR = 1e-3


def _output_metric(module: nn.Module, layer: LayerLayout) -> torch.Tensor | None:
    weight = output_projection(module, layer.query_heads * layer.value_dim)
    return None if weight is None else output_metric(weight, layer.query_heads, layer.kv_heads)


def _validated(
    model: PreTrainedModel,
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    tried: dict[Any, Calibration],
) -> dict[Any, Outcome]:
    candidates = [Candidate(name, calibrated_spec(settings.ratio, one), one) for name, one in tried.items()]
    return dict(validate(model, held, candidates, settings.selection))


def _validation(
    model: PreTrainedModel, held: Sequence[ProbedPrefix], settings: CalibrationSettings, best: Calibration
) -> list[dict[str, Any]]:
    """At every ratio: the fixed recipe, and what each decision adds to it."""
    rows = []
    for ratio in settings.ratios:
        fixed = CompressionSpec(ratio=ratio, group_size=settings.group_size)
        own = calibrated_spec(ratio, best, basis="document", factor_dtype="int8")
        steps = [
            Candidate("recipe", fixed),
            Candidate("derived index", replace(fixed, index="derived")),
            Candidate("ranks and weights", own, best),
            Candidate("calibrated bases", calibrated_spec(ratio, best, factor_dtype="int8"), best),
            Candidate("4 bits", calibrated_spec(ratio, best, factor_dtype="int4"), best),
            Candidate("2, 4 and 8 bits", calibrated_spec(ratio, best), best),
        ]
        for name, outcome in validate(model, held, steps, settings.selection).items():
            rows.append({"asked": ratio, "step": name, **outcome.as_dict()})
    return rows


def _tolerance_figures(tolerances: Tolerances, moments: Moments) -> list[dict[str, Any]]:
    return [
        {
            "layer": moments.layers[place].index,
            "kind": kind,
            "noise": list(SHARES),
            "divergence": one.divergence,
            "tolerated": one.error / float(moments.covariance(kind, place).trace()),
        }
        for (place, kind), one in tolerances.items()
    ]
