"""What each metric of a calibration is worth: divergence and answers on documents held out, by ratio.

    python benchmarks/calibration_weights.py                           # the bundled model
    python benchmarks/calibration_weights.py --model runs/second/model --device cuda
    python benchmarks/calibration_weights.py --family qwen3 --ratios 8 20 32

Groups are the fixed ones, bases shared, bits mixed. The baseline is the metric "tolerance"; differences to it
are paired by document. An answer counts when every token of it is the likeliest one. Models with random
weights have no answers; every token is rebuilt there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev

import torch
from calibration_families import FAMILIES, family_document, family_model
from report import Report, command
from token_weights import weighted_moments
from transformers import PreTrainedModel

from xkv_service.calibration.calibrate import measured_tolerances
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.metrics import WEIGHTINGS
from xkv_service.calibration.observed import Observed, observe_document, reach_of
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions, right_answers
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.compression import factorize_prefill
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.demo import demo_model_path
from xkv_service.errors import RatioUnreachable
from xkv_service.evaluation.probed import probed_document
from xkv_service.fidelity import compare_distributions
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import load_model
from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.spec import SelectionSpec

BASELINE = "tolerance"
Measured = dict[tuple[float, str], list[tuple[float, float]]]
"""By ratio and metric: divergence and share of right answers, one of each document."""


def main() -> None:
    """Calibrate in every metric, measure, print, write JSON."""
    arguments = _arguments()
    model, sample, selection = _model_and_sample(arguments)
    used, held = sample[: arguments.documents], sample[arguments.documents :]
    with torch.no_grad():
        tried = _calibrations(model, used, weigh_tokens=arguments.tokens_weighted)
        found: Measured = {}
        for document in held:
            _measure(model, document, tried, arguments.ratios, selection, found)
            print(f"measured on {document.name}", flush=True)
    report = Report("calibration_weights", command(), f"the metric {BASELINE!r}, same documents")
    for (ratio, name), measured in found.items():
        base = found[ratio, BASELINE]
        differences = [mine[0] - other[0] for mine, other in zip(measured, base, strict=True)]
        report.add(
            ratio=ratio,
            metric=name,
            kl=fmean(kl for kl, _ in measured),
            difference=fmean(differences),
            error=stdev(differences) / len(differences) ** 0.5,
            over_baseline=fmean(kl for kl, _ in measured) / fmean(kl for kl, _ in base),
            **({} if arguments.family else {"answers": fmean(right for _, right in measured)}),
        )
    report.write(arguments.out, used=len(used), held=len(held), model=arguments.family or arguments.model)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration_weights.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--family", choices=[name.split()[0] for name in FAMILIES], help="random weights")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=8, help="that bases are made from")
    parser.add_argument("--held", type=int, default=8, help="that they are tried on")
    parser.add_argument("--tokens", type=int, help="of a document; 4,096, random weights 1,536")
    parser.add_argument("--ratios", type=float, nargs="+", default=[20.0, 32.0, 48.0, 64.0])
    parser.add_argument("--tokens-weighted", action="store_true", help="weigh tokens by attention too")
    return parser.parse_args()


def _model_and_sample(
    arguments: argparse.Namespace,
) -> tuple[PreTrainedModel, list[ProbedPrefix], SelectionSpec | None]:
    count = arguments.documents + arguments.held
    if arguments.family:
        (name,) = (name for name in FAMILIES if name.startswith(arguments.family))
        model = family_model(name, arguments.seed).to(arguments.device)
        tokens = arguments.tokens or 1536
        return model, [family_document(one, tokens) for one in range(count)], SelectionSpec("dense")
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    tokens = arguments.tokens or 4096
    sample = [
        probed_document(loaded.tokenizer, "demo_documents", f"weights {one}", tokens, 6)
        for one in range(count)
    ]
    return loaded.model, sample, None


def _calibrations(
    model: PreTrainedModel, used: list[ProbedPrefix], *, weigh_tokens: bool
) -> Mapping[str, Calibration]:
    settings = CalibrationSettings()
    found = Observed.nothing(model, reach_of(inspect_loaded(model).layout, settings))
    for document in used:
        observe_document(model, document, found)
    tolerances = measured_tolerances(model, found.moments, used[: settings.tolerance_documents])
    candidates = Candidates(model, found, tolerances, settings)
    groups = candidates.fixed_groups()
    tried: dict[str, Calibration] = {one: candidates.calibration(one, groups) for one in WEIGHTINGS}
    if weigh_tokens:
        for name, other in weighted_moments(model, found, used).items():
            weighted = Candidates(model, other, tolerances, settings)
            tried[f"{BASELINE}, {name}"] = weighted.calibration(BASELINE, groups)
    return tried


def _measure(
    model: PreTrainedModel,
    document: ProbedPrefix,
    tried: Mapping[str, Calibration],
    ratios: list[float],
    selection: SelectionSpec | None,
    found: Measured,
) -> None:
    exact = prefill(model, torch.tensor(document.token_ids))
    base = predictions(model, exact_cache(exact), document.probes)
    for ratio in ratios:
        for name, calibration in tried.items():
            try:
                factors, _ = factorize_prefill(model, exact, calibrated_spec(ratio, calibration), calibration)
            except RatioUnreachable:
                continue
            with enable_xkv(model):
                cache = XKVCache.from_factors(model, factors, selection)
                other = predictions(model, cache, document.probes)
            _, kl = compare_distributions(base, other)
            right = right_answers(other, document.probes)
            found.setdefault((ratio, name), []).append((kl, fmean(right) if right else 0.0))
    exact.free()


if __name__ == "__main__":
    main()
