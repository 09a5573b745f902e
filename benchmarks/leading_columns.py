"""What the leading columns of an artifact's token factors are worth alone: fidelity, answers, bytes, seconds.

python benchmarks/leading_columns.py --out benchmarks/results/leading_columns.json
python benchmarks/leading_columns.py --model runs/second/model --calibration runs/second.safetensors

Each document is prefilled once, compressed in each way, and its artifact cut to a share of its columns, in
every group alike. `top1` and `kl` are what the artifact's own fidelity check finds for the columns that are
left, `answers` the share of questions behind the document whose every token is the likeliest one, chosen
tokens rebuilt as in serving. `bytes` is what is left of the artifact, counted by columns, and `blocks` what
has to be read of its file, where columns stand in blocks of 64 of one width. The baseline is the whole
artifact, in the same process; beside its half stands an artifact that was compressed to half the bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from bundled import load
from report import Report, command

from xkv_service import CompressionSpec, XKVCache, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.demo import demo_calibration_path
from xkv_service.errors import RatioUnreachable
from xkv_service.evaluation.probed import probed_document
from xkv_service.factors import GroupFactors, LowRank, PrefixFactors
from xkv_service.fidelity import certify, compare_distributions, held_back
from xkv_service.modeling.models import LoadedModel
from xkv_service.packed_factors import leading_columns, leading_runs
from xkv_service.prefilling.prefill import prefill

SHARES = (0.25, 0.5, 0.75, 1.0)
ACCEPTED = 0.9
"""`min_fidelity` of a server, by default."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load(arguments.model)
    calibration = read_calibration_file(arguments.calibration)
    found: list[dict[str, float | str]] = []
    with torch.no_grad(), enable_xkv(loaded.model):
        for number in range(arguments.documents):
            document = probed_document(
                loaded.tokenizer, "demo_documents", f"columns {number}", arguments.tokens, arguments.questions
            )
            found += _measured(loaded, document, calibration, arguments.ratios)
            print(f"measured on document {number}", flush=True)
    report = Report("leading_columns", command(), "all columns of the same artifact")
    for name in dict.fromkeys((row["way"], row["ratio"], row["share"]) for row in found):
        rows = [row for row in found if (row["way"], row["ratio"], row["share"]) == name]
        figures = [key for key in rows[0] if key not in ("way", "ratio", "share")]
        passed = sum(float(row["top1"]) >= ACCEPTED for row in rows)
        report.add(
            **dict(zip(("way", "ratio", "share"), name, strict=True)),
            **{key: fmean(float(row[key]) for row in rows) for key in figures},
            passed=f"{passed}/{len(rows)}",
        )
    report.write(
        arguments.out,
        note="means over documents; passed: documents whose top1 is accepted by a server's default, 0.9",
        model=arguments.model or "bundled",
        tokens=arguments.tokens,
        questions=arguments.questions,
        found=found,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leading_columns.json"))
    parser.add_argument("--model", help="a folder; the bundled one by default")
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--questions", type=int, default=8, help="about each")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 20.0])
    return parser.parse_args()


def _measured(
    loaded: LoadedModel, document: ProbedPrefix, calibration: Calibration, ratios: list[float]
) -> Iterator[dict[str, float | str]]:
    ids = torch.tensor(document.token_ids)
    began = time.perf_counter()
    exact = prefill(loaded.model, ids, tail=held_back(len(ids)))
    prefill_s = time.perf_counter() - began
    base = predictions(loaded.model, exact_cache(exact), document.probes)
    made = []
    for ratio in ratios:
        for way in ("int8, own bases", "int8", "mixed"):
            for times in (1, 2):  # of the half, an artifact that was made for its bytes stands beside it
                spec = _spec(way, ratio * times, calibration)
                named = calibration if spec.calibration is not None else None
                try:
                    factors, _ = factorize_prefill(loaded.model, exact, spec, named)
                except RatioUnreachable:
                    continue
                if times == 1:
                    whole = factors
                    made += [(way, ratio, share, _leading(whole, share), whole) for share in SHARES]
                else:
                    made.append((f"{way}, compressed to it", ratio, 0.5, factors, whole))
    for way, ratio, share, factors, whole in made:
        began = time.perf_counter()
        fidelity = certify(loaded.model, exact, factors, (), ())
        certify_s = time.perf_counter() - began
        logits = predictions(loaded.model, XKVCache.from_factors(loaded.model, factors), document.probes)
        yield {
            "way": way,
            "ratio": ratio,
            "share": share,
            "bytes": factors.nbytes / whole.nbytes,
            "blocks": _read_bytes(whole, factors) / whole.nbytes,
            "top1": fidelity.top1_agreement,
            "kl": fidelity.kl,
            "answers": _right(logits, document),
            "answers_kl": compare_distributions(base, logits)[1],
            "certify_s": certify_s,
            "certify_of_prefill": certify_s / prefill_s,
        }
    exact.free()


def _spec(way: str, ratio: float, calibration: Calibration) -> CompressionSpec:
    if way == "mixed":
        return calibrated_spec(ratio, calibration)
    if way == "int8":
        return calibrated_spec(ratio, calibration, factor_dtype="int8")
    return CompressionSpec(ratio=ratio, base_dtype="int8")


def _read_bytes(whole: PrefixFactors, part: PrefixFactors) -> int:
    """Bytes of the whole artifact's tensors that hold what the part has."""
    stored = whole.to_tensors()
    return sum(stored[name].nbytes for name in part.to_tensors() if name in stored)


def _leading(factors: PrefixFactors, share: float) -> PrefixFactors:
    """The artifact with the first columns only, that share of each group's, at least one."""
    return replace(factors, groups=tuple(_leading_group(group, share) for group in factors.groups))


def _leading_group(group: GroupFactors, share: float) -> GroupFactors:
    assert group.values is not None
    key, value = (max(1, round(share * pair.rank)) for pair in (group.keys, group.values))
    layout = group.layout.model_copy(
        update={
            "rank_k": key,
            "rank_v": value,
            "columns_k": leading_runs(group.layout.columns_k, key),
            "columns_v": leading_runs(group.layout.columns_v, value),
        }
    )
    return GroupFactors(layout, _leading_pair(group.keys, key), _leading_pair(group.values, value))


def _leading_pair(pair: LowRank, rank: int) -> LowRank:
    return replace(
        pair,
        factors=leading_columns(pair.factors, rank),
        directions=pair.directions[:rank],
        scales=None if pair.scales is None else pair.scales[:rank],
    )


def _right(logits: torch.Tensor, document: ProbedPrefix) -> float:
    """Share of probes whose answer is said word for word."""
    right, position = 0, 0
    for probe in document.probes:
        answer = torch.tensor(probe.token_ids[1 - probe.counted :])
        said = logits[position : position + len(answer)].argmax(-1)
        right += bool((said == answer).all())
        position += probe.counted
    return right / len(document.probes)


if __name__ == "__main__":
    main()
