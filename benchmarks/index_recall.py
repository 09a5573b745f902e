"""Which sketches find the attention: recall by layer, of indexes of few bytes and of the layer before.

    python benchmarks/index_recall.py --calibration calibration.safetensors --out index_recall.json

The sketches are of the keys that the factors give, at the ratio asked for, over the calibration's planes.
Recall is the share of the exact attention that the chosen tokens hold, all else that is seen included: the
median over the tokens of questions and answers, the mean over heads. `next` is the recall of the following
layer when it takes this one's choice. `random:FAMILY` calibrates a model with random weights first.
"""

from __future__ import annotations

import argparse
import copy
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from report import Report, command
from transformers import PreTrainedModel

from xkv_service import SelectionSpec, XKVCache, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix, predictions
from xkv_service.calibration.recall import RecallMeter
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import Scoring
from xkv_service.decoding.select import Selected, Selection
from xkv_service.demo import demo_calibration_path, demo_model_path
from xkv_service.modeling.models import load_model
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill

SKETCHES = ((12, 4), (8, 4), (8, 3), (8, 2), (6, 4), (4, 4), (4, 3), (4, 2), (2, 4))
"""Planes and bits."""


class Sketch:
    """A key sketch of any number of bits, as numbers: 2 bits have four levels, others one at 0."""

    unit = 1

    def __init__(self, keys: torch.Tensor, planes: torch.Tensor, bits: int) -> None:
        self._dims = planes.long().to(keys.device).flatten(1)
        picked = keys.float().gather(-1, self._dims.expand(keys.shape[0], -1, -1))
        if bits == 2:
            scale = picked.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) / 2
            levels = ((picked / scale + 3) / 2).round().clamp(0, 3) * 2 - 3
        else:
            most = 2 ** (bits - 1) - 1
            scale = picked.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
            levels = (picked / scale).round().clamp(-most, most)
        self._kept = (levels * scale).permute(1, 2, 0).contiguous()

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """As every `Scorer`."""
        index = self._dims[:, None].expand(-1, queries.shape[1], -1)
        return queries.float().gather(-1, index) @ self._kept


class PairMeter(RecallMeter):
    """Notes the recall of the choices of the layer before as well."""

    def __init__(self, before: PairMeter | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._before = before
        self.following: dict[str, list[float]] = {name: [] for name in self.found}

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """As `RecallMeter`."""
        chosen = super().__call__(queries, others, scoring)
        for name, mine in self.following.items():
            if self._before is not None:
                mine += self.kept(self._before.chosen[name])
        return chosen


def main() -> None:
    """Measure every document; print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    model, calibration, documents = _given(arguments)
    found: dict[tuple[str, int, str], list[float]] = {}
    for number, document in enumerate(documents, 1):
        for name, values in _measured(model, calibration, document, arguments).items():
            found.setdefault(name, []).extend(values)
        print(f"{document.name}: {number}/{len(documents)}", flush=True)
    report = Report("index_recall", command(), "exact scores")
    layers = sorted({layer for _, layer, _ in found})
    for name in dict.fromkeys(name for name, _, _ in found):
        for kind in ("own", "next"):
            values = {layer: found.get((name, layer, kind)) for layer in layers}
            medians = {f"layer {layer}": _median(one) for layer, one in values.items() if one}
            report.add(index=name, choice=kind, **medians)
    report.write(arguments.out, documents=len(documents), ratio=arguments.ratio)


def _arguments() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index_recall.json"))
    parser.add_argument("--model", default=str(demo_model_path()), help="a folder, or random:llama")
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratio", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=4096, help="length of a document")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=6, help="questions about each")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256])
    return parser.parse_args()


def _given(arguments: Namespace) -> tuple[PreTrainedModel, Calibration, Sequence[ProbedPrefix]]:
    if arguments.model.startswith("random:"):
        return _random(arguments)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    from make_demo_calibration import _document

    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    # Others than the calibration's, of every kind of task.
    documents = [_document(loaded, 100 + number, arguments) for number in range(arguments.documents)]
    return loaded.model, read_calibration_file(arguments.calibration), documents


def _random(arguments: Namespace) -> tuple[PreTrainedModel, Calibration, Sequence[ProbedPrefix]]:
    from calibration_families import FAMILIES, _document, _model

    from xkv_service.calibration.calibrate import calibrate
    from xkv_service.calibration.settings import CalibrationSettings

    family = next(name for name in FAMILIES if name.startswith(arguments.model.removeprefix("random:")))
    model = _model(family)
    settings = CalibrationSettings(
        ratio=arguments.ratio, ratios=(), weightings=("plain",), selection=SelectionSpec("dense")
    )
    sample = [_document(number, arguments.tokens) for number in range(8 + arguments.documents)]
    return model, calibrate(model, sample[:8], settings), sample[8:]


@torch.no_grad()
def _measured(
    model: PreTrainedModel, calibration: Calibration, document: ProbedPrefix, arguments: Namespace
) -> Mapping[tuple[str, int, str], list[float]]:
    exact = prefill(model, torch.tensor(document.token_ids))
    spec = calibrated_spec(arguments.ratio, calibration)
    prefix = Prefix.of(model, factorize_prefill(model, exact, spec, calibration)[0])
    cache, meters = XKVCache(prefix, SelectionSpec("dense")), _meters(prefix, exact, calibration, arguments)
    for layer in cache.layers:
        if isinstance(layer, PrefixLayer):
            layer.selection = meters[layer.index]  # type: ignore[assignment]
    with enable_xkv(model):
        predictions(model, cache, document.probes)
    exact.free()
    own = {(name, at, "own"): values for at, one in meters.items() for name, values in one.found.items()}
    before = dict(zip(list(meters)[1:], list(meters), strict=False))
    following = {
        (name, before[at], "next"): values
        for at, one in meters.items()
        for name, values in one.following.items()
        if values
    }
    return own | following


def _meters(
    prefix: Prefix, exact: Prefill, calibration: Calibration, arguments: Namespace
) -> dict[int, PairMeter]:
    meters: dict[int, PairMeter] = {}
    before = None
    for at, layer in sorted(prefix.layers.items()):
        assert isinstance(layer, LayerPrefix)
        choices = _choices(layer, calibration.planes[at], arguments.budgets)
        before = meters[at] = PairMeter(before, layer, exact.rotated_keys(at), choices)
    return meters


def _choices(layer: LayerPrefix, planes: torch.Tensor, budgets: Sequence[int]) -> dict[str, Selection]:
    keys = layer.keys(torch.arange(layer.tokens, device=layer.positions.device))
    found = {}
    for budget in budgets:
        found[f"exact scores, {budget} tokens"] = Selection(layer, SelectionSpec("exact", budget))
        for count, bits in SKETCHES:
            view = copy.copy(layer)
            view.index = Sketch(keys, planes[:, :count], bits)
            name = f"{count} planes of {bits} bits ({count * bits / 4 + 2:g} bytes), {budget} tokens"
            found[name] = Selection(view, SelectionSpec(budget=budget))
    return found


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).median())


if __name__ == "__main__":
    main()
