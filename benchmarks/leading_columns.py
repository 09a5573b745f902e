"""What parts of artifacts are worth: fidelity as precompute measures it, answers, bytes, seconds.

python benchmarks/leading_columns.py --first-document 2 --documents 12
python benchmarks/leading_columns.py --model runs/second/model --calibration runs/second.safetensors

Each document is prefilled once, compressed in each way, and its artifact cut to a share of its columns, in
every group alike and in whole blocks, as a server would load it. `top1` and `kl` are what the artifact's own
fidelity check finds for the columns that are left, `answers` the share of questions behind the document whose
every token is the likeliest one, chosen tokens rebuilt as in serving, and `lost` how many questions the whole
artifact answers so and the part does not. `bytes` is what has to be read of the artifact. `accepted`: whether
a server would use the part, by the defaults of --part-kl and --min-fidelity; `bounds` has what each value of
--part-kl would use of each way, and the answers that loses. The baseline is the whole artifact, in the same
process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from bundled import load
from report import Report, command

from xkv_service import CompressionSpec, XKVCache, enable_xkv
from xkv_service.api.settings import APISettings
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec, calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.demo import demo_calibration_path
from xkv_service.errors import RatioUnreachable
from xkv_service.evaluation.probed import probed_document
from xkv_service.fidelity import certify, compare_distributions, held_back
from xkv_service.leading_part import leading_part
from xkv_service.modeling.models import LoadedModel
from xkv_service.prefilling.prefill import prefill

LIMITS = APISettings()
BOUNDS = (1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 1e-2)
WAYS = ("calibrated", "mixed", "8 bits", "no calibration")
Row = dict[str, float | str]


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load(arguments.model)
    calibration = read_calibration_file(arguments.calibration)
    found: list[Row] = []
    numbers = range(arguments.first_document, arguments.first_document + arguments.documents)
    with torch.no_grad(), enable_xkv(loaded.model):
        for number in numbers:
            seed, questions = f"columns {number}", arguments.questions
            document = probed_document(loaded.tokenizer, arguments.task, seed, arguments.tokens, questions)
            measured = _measured(loaded, document, calibration, arguments)
            found += [{"document": number, **row} for row in measured]
            print(f"measured on document {number}", flush=True)
    report = Report("leading_columns", command(), "all columns of the same artifact")
    _sum_up(report, found)
    report.write(
        arguments.out,
        note="means over documents; accepted: documents whose part a server would use, by its defaults",
        model=arguments.model or "bundled",
        task=arguments.task,
        tokens=arguments.tokens,
        questions=arguments.questions,
        part_kl=LIMITS.part_kl,
        min_fidelity=LIMITS.min_fidelity,
        bounds=[_verdict(found, bound, way) for way in arguments.ways for bound in BOUNDS],
        least_kl_that_loses={way: _least_loser(found, way) for way in arguments.ways},
        found=found,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leading_columns_confirmed.json"))
    parser.add_argument("--model", help="a folder; the bundled one by default")
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    parser.add_argument("--task", default="demo_documents", help="whose documents and questions")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first-document", type=int, default=0, help="0 and 1 chose the bound")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--questions", type=int, default=8, help="about each")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 20.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY")
    return parser.parse_args()


def _sum_up(report: Report, found: list[Row]) -> None:
    for name in dict.fromkeys((row["way"], row["ratio"], row["share"]) for row in found):
        rows = [row for row in found if (row["way"], row["ratio"], row["share"]) == name]
        figures = [key for key in rows[0] if key not in ("document", "way", "ratio", "share", "accepted")]
        report.add(
            **dict(zip(("way", "ratio", "share"), name, strict=True)),
            **{key: fmean(float(row[key]) for row in rows) for key in figures},
            accepted=f"{sum(bool(row['accepted']) for row in rows)}/{len(rows)}",
        )


def _verdict(found: list[Row], bound: float, way: str) -> Row:
    """How many parts of a way would be used by a bound, of how many, and how many answers they lose."""
    parts = [row for row in found if row["way"] == way and float(row["bytes"]) < 1]
    used = [row for row in parts if float(row["kl"]) <= bound and float(row["top1"]) >= LIMITS.min_fidelity]
    return {
        "way": way,
        "kl": bound,
        "parts": len(parts),
        "used": len(used),
        "lost": sum(float(row["lost"]) for row in used),
        "parts_that_lose": sum(float(row["lost"]) > 0 for row in used),
    }


def _least_loser(found: list[Row], way: str) -> float | None:
    """The least divergence of a part that loses an answer."""
    losers = [float(row["kl"]) for row in found if row["way"] == way and float(row["lost"])]
    return min(losers, default=None)


def _measured(
    loaded: LoadedModel,
    document: ProbedPrefix,
    calibration: Calibration,
    arguments: argparse.Namespace,
) -> Iterator[Row]:
    ids = torch.tensor(document.token_ids)
    began = time.perf_counter()
    exact = prefill(loaded.model, ids, tail=held_back(len(ids)))
    prefill_s = time.perf_counter() - began
    base = predictions(loaded.model, exact_cache(exact), document.probes)
    made = []
    for ratio in arguments.ratios:
        for way, spec in _specs(ratio, calibration).items():
            if way not in arguments.ways:
                continue
            named = calibration if spec.calibration is not None else None
            try:
                whole, _ = factorize_prefill(loaded.model, exact, spec, named)
            except RatioUnreachable:
                continue
            made.append((way, ratio, whole))
    for way, ratio, whole in made:
        right: list[bool] = []
        for share in (1.0, *arguments.shares):
            part = whole if share == 1 else leading_part(whole, share)
            began = time.perf_counter()
            fidelity = certify(loaded.model, exact, part, (), ())
            certify_s = time.perf_counter() - began
            logits = predictions(loaded.model, XKVCache.from_factors(loaded.model, part), document.probes)
            answered = _right(logits, document)
            right = right or answered
            read = part.nbytes / whole.nbytes
            yield {
                "way": way,
                "ratio": ratio,
                "share": share,
                "bytes": read,
                "top1": fidelity.top1_agreement,
                "kl": fidelity.kl,
                "answers": fmean(answered),
                "lost": sum(one and not other for one, other in zip(right, answered, strict=True)),
                "answers_kl": compare_distributions(base, logits)[1],
                "accepted": read < 1
                and whole.spec.basis == "calibrated"
                and fidelity.kl <= LIMITS.part_kl
                and fidelity.top1_agreement >= LIMITS.min_fidelity,
                "certify_s": certify_s,
                "certify_of_prefill": certify_s / prefill_s,
            }
    exact.free()


def _specs(ratio: float, calibration: Calibration) -> dict[str, CompressionSpec]:
    """What `xkv precompute` makes of a ratio: by default, with a calibration and without, and by `--bits`."""
    specs = {
        "calibrated": best_spec(ratio, calibration),
        "mixed": calibrated_spec(ratio, calibration),
        "8 bits": calibrated_spec(ratio, calibration, factor_dtype="int8"),
        "no calibration": CompressionSpec(ratio=ratio).over("document"),
    }
    if specs["mixed"] == specs["calibrated"]:
        del specs["mixed"]
    return specs


def _right(logits: torch.Tensor, document: ProbedPrefix) -> list[bool]:
    """Of each probe, whether its answer is said word for word."""
    right, position = [], 0
    for probe in document.probes:
        answer = torch.tensor(probe.token_ids[1 - probe.counted :])
        said = logits[position : position + len(answer)].argmax(-1)
        right.append(bool((said == answer).all()))
        position += probe.counted
    return right


if __name__ == "__main__":
    main()
