"""Other codings of factors, bases and landmarks against today's, at equal stored bytes.

    python benchmarks/coding.py --processes 2
    python benchmarks/coding.py --model runs/second/model --calibration second.safetensors --out second.json

Every way gets the bytes of the file that today's way makes at the ratio; what a coding takes or saves beside
that goes into ranks and bits. Rebuilt numbers are what that coding would give; nothing of it is stored:

- `turned`: columns of 4 and 2 bits, in blocks of 64, over their deviation and turned by a random orthogonal
  matrix; one scale a column, as today.
- `token scales`: such blocks with a scale for each token and block in place of the column's, 8 bits each
  (counted, but not rounded, in its favour); `turned, token scales` both; `, whole run`: one block for all
  columns of equal bits.
- `fp8 bases`, `int8 bases`: a document's own bases as float8_e4m3fn or integers, one float32 scale a row.
  `int8 and int4 bases`: rows of columns of 2 bits have 4; `int4 bases`: all have.
- `fp8 landmarks`: the paper's index, means as float8_e4m3fn, the chosen chunks' tokens rebuilt.

Answers are right when every token of the expected reply is the likeliest one, given those before it; `kl` is
the divergence (nats) there. Errors are relative, over all tokens and layers.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

import torch
from report import Report, command

from xkv_artifacts.manifest import GroupLayout
from xkv_service import CompressionSpec
from xkv_service.calibration import plan
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import Probe, exact_cache, predictions
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill, rotary_tables
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.demo import demo_calibration_path, demo_model_path
from xkv_service.errors import RatioUnreachable
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.tasks.base import Room
from xkv_service.evaluation.tasks.registry import find_tasks
from xkv_service.factorization import group_factors, projected_factors
from xkv_service.factorization.quantize import best_scales, quantize_columns, round_odd_plainly
from xkv_service.factorization.ranks import size_of
from xkv_service.factors import LowRank, PrefixFactors
from xkv_service.fidelity import compare_distributions
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.packed_factors import Runs
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.reconstruct import rebuild
from xkv_service.selection.spec import SelectionSpec
from xkv_service.stored import DTYPES, runs_of

BLOCK = 64
RATIOS = (8.0, 20.0, 32.0)
LANDMARK_RATIOS = (6.0, 8.0, 12.0)
_SEARCH = 20

Groups = Sequence[GroupLayout]
Quantize = Callable[[torch.Tensor, Runs, slice], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Coding:
    """One way to code what is stored.

    Args:
        bytes: what it takes (or, below 0, saves) beside today's coding of the same ranks and bits.
        quantize: in place of `quantize_runs`. bases, landmarks: what rounding does to them.
        base_bits: of a number of the document's own bases, for the choice of ranks and bits.
    """

    bytes: Callable[[Groups, int, CompressionSpec], float] = lambda groups, tokens, spec: 0.0
    quantize: Quantize | None = None
    bases: Callable[[torch.Tensor, Runs], torch.Tensor] | None = None
    landmarks: Callable[[torch.Tensor], torch.Tensor] | None = None
    base_bits: int = 16


def _blocks(runs: Runs, block: int | None) -> Iterator[tuple[int, int, int]]:
    """(first column, one past the last, bits) of the blocks that columns are turned and scaled in."""
    first = 0
    for bits, count in runs:
        step = count if block is None or bits == 8 else block
        for start in range(first, first + count, step):
            yield start, min(start + step, first + count), bits
        first += count


def _turn(columns: int) -> torch.Tensor:
    """A random orthogonal matrix, the same for every document."""
    drawn = torch.randn(columns, columns, generator=torch.Generator().manual_seed(columns))
    return torch.linalg.qr(drawn).Q


def _quantized(*, turned: bool, by_token: bool, block: int | None) -> Quantize:
    def quantize(factors: torch.Tensor, runs: Runs, counted: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = torch.empty_like(factors)
        for start, stop, bits in _blocks(runs, block):
            columns = factors[:, start:stop]
            if bits == 8:
                integers, scales = quantize_columns(columns, counted)
                rounded[:, start:stop] = integers * scales
                continue
            size = columns[counted].square().mean(0).sqrt().clamp_min(1e-30)
            turn = _turn(stop - start) if turned else torch.eye(stop - start)
            even = columns / size @ turn
            if by_token:
                scales = best_scales(even.T, bits)[:, None]
                integers = round_odd_plainly(even.T, scales.T, bits).T
            else:
                scales = best_scales(even[counted], bits)
                integers = round_odd_plainly(even, scales, bits)
            rounded[:, start:stop] = integers * scales @ turn.T * size
        return rounded, torch.ones(factors.shape[1])

    return quantize


def _token_scale_bytes(block: int | None) -> Callable[[Groups, int, CompressionSpec], float]:
    def count(groups: Groups, tokens: int, spec: CompressionSpec) -> float:
        runs = [one for group in groups for one in (group.columns_k, group.columns_v)]
        return tokens * sum(bits < 8 for one in runs for _, _, bits in _blocks(one, block))

    return count


def _base_bytes(bits_of: Callable[[int], int]) -> Callable[[Groups, int, CompressionSpec], float]:
    """Rows of so many bits, by those of their column, and a scale each in place of 16 bits."""

    def count(groups: Groups, tokens: int, spec: CompressionSpec) -> float:
        parts = [
            (runs_of(spec, rank, columns), sum(widths))
            for group in groups
            for rank, columns, widths in (
                (group.rank_k, group.columns_k, group.key_widths),
                (group.rank_v, group.columns_v, group.value_widths),
            )
        ]
        return sum(
            count * (4 + width * (bits_of(bits) - 16) / 8) for runs, width in parts for bits, count in runs
        )

    return count


def _landmark_bytes(groups: Groups, tokens: int, spec: CompressionSpec) -> float:
    chunks = -(-tokens // spec.landmark_chunk)
    return -(DTYPES[spec.dtype].itemsize - 1) * chunks * sum(sum(group.key_widths) for group in groups)


def _fp8_rows(bases: torch.Tensor, runs: Runs) -> torch.Tensor:
    scales = bases.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
    return (bases.float() / scales).to(torch.float8_e4m3fn).float() * scales


def _integer_rows(bits_of: Callable[[int], int]) -> Callable[[torch.Tensor, Runs], torch.Tensor]:
    def rounded(bases: torch.Tensor, runs: Runs) -> torch.Tensor:
        wide = bases.float().T
        return torch.cat([part for part in parts(wide, runs)], 1).T

    def parts(wide: torch.Tensor, runs: Runs) -> Iterator[torch.Tensor]:
        for part, (bits, _) in zip(wide.split([count for _, count in runs], 1), runs, strict=True):
            if bits_of(bits) == 8:
                integers, scales = quantize_columns(part, slice(None))
            else:
                scales = best_scales(part, bits_of(bits))
                integers = round_odd_plainly(part, scales, bits_of(bits))
            yield integers * scales

    return rounded


def _few(bits: int) -> int:
    return 4 if bits == 2 else 8


def _fp8(landmarks: torch.Tensor) -> torch.Tensor:
    return landmarks.to(torch.float8_e4m3fn).to(landmarks.dtype)


TODAY = Coding()
COLUMNS = {
    "today": TODAY,
    "turned": Coding(quantize=_quantized(turned=True, by_token=False, block=BLOCK)),
    "token scales": Coding(_token_scale_bytes(BLOCK), _quantized(turned=False, by_token=True, block=BLOCK)),
    "turned, token scales": Coding(
        _token_scale_bytes(BLOCK), _quantized(turned=True, by_token=True, block=BLOCK)
    ),
    "turned, token scales, whole run": Coding(
        _token_scale_bytes(None), _quantized(turned=True, by_token=True, block=None)
    ),
}
BASES = {
    "today": TODAY,
    "fp8 bases": Coding(_base_bytes(lambda bits: 8), bases=_fp8_rows, base_bits=8),
    "int8 bases": Coding(_base_bytes(lambda bits: 8), bases=_integer_rows(lambda bits: 8), base_bits=8),
    "int4 bases": Coding(_base_bytes(lambda bits: 4), bases=_integer_rows(lambda bits: 4), base_bits=4),
}
FEW = Coding(_base_bytes(_few), bases=_integer_rows(_few), base_bits=6)
LANDMARKS = {"today": TODAY, "fp8 landmarks": Coding(_landmark_bytes, landmarks=_fp8)}


@dataclass(frozen=True)
class Recipe:
    """What today's way is, and the codings tried in its place."""

    spec: Callable[[float, Any], CompressionSpec]
    codings: Mapping[str, Coding]
    ratios: tuple[float, ...] = RATIOS
    calibrated: bool = True
    selection: SelectionSpec = SelectionSpec()


RECIPES = {
    "shared bases, mixed bits": Recipe(lambda ratio, found: calibrated_spec(ratio, found), COLUMNS),
    "own bases, mixed bits": Recipe(
        lambda ratio, found: replace(calibrated_spec(ratio, found, basis="document"), base_dtype=None),
        {**BASES, "int8 and int4 bases": FEW},
    ),
    "own bases, int8, no calibration": Recipe(
        lambda ratio, _: CompressionSpec(ratio=ratio, index="derived"), BASES, calibrated=False
    ),
    "own bases, int8, no calibration, landmarks": Recipe(
        lambda ratio, _: CompressionSpec(ratio=ratio, index="landmark"),
        LANDMARKS,
        LANDMARK_RATIOS,
        calibrated=False,
        selection=SelectionSpec(selector="landmark"),
    ),
}


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    report = Report("coding", command(), "today's coding of the same recipe, at the same bytes")
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        found = list(pool.map(_document, [(arguments, number) for number in range(arguments.documents)]))
    for key in found[0]:
        recipe, coding, ratio = key
        each = [one[key] for one in found]
        if None in each:
            report.add(recipe=recipe, asked=ratio, coding=coding, reason="the ratio cannot be reached")
            continue
        base = [one[recipe, "today", ratio] for one in found]
        gained = [one["right"] - other["right"] for one, other in zip(each, base, strict=True)]
        report.add(
            recipe=recipe,
            asked=ratio,
            coding=coding,
            **{name: fmean(one[name] for one in each) for name in each[0]},
            right_against_today=fmean(gained),
            right_against_today_error=stdev(gained) / len(gained) ** 0.5,
            kl_over_today=fmean(one["kl"] for one in each) / fmean(one["kl"] for one in base),
        )
    report.write(
        arguments.out,
        documents=arguments.documents,
        questions=arguments.questions,
        model=Path(arguments.model).name,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coding.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=20, help="about each document")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    return parser.parse_args()


def _document(task: tuple[argparse.Namespace, int]) -> dict[tuple[str, str, float], dict[str, float] | None]:
    """What was measured of one document, by recipe, coding and ratio; None where it cannot be reached."""
    arguments, number = task
    torch.set_num_threads(1)
    loaded = load_model(arguments.model, device="cpu", dtype="float32")
    calibration = read_calibration_file(arguments.calibration)
    ids, probes, expected = _questions(loaded, number, arguments)
    exact = prefill(loaded.model, torch.tensor(ids))
    base = predictions(loaded.model, exact_cache(exact), probes)
    found: dict[tuple[str, str, float], dict[str, float] | None] = {}
    for name, recipe in ((name, RECIPES[name]) for name in arguments.recipes):
        given = calibration if recipe.calibrated else None
        for ratio in recipe.ratios:
            spec = recipe.spec(ratio, given)
            for coding_name, coding in recipe.codings.items():
                key = name, coding_name, ratio
                try:
                    factors, size = _coded(loaded, exact, spec, given, coding)
                except RatioUnreachable:
                    found[key] = None
                    continue
                with enable_xkv(loaded.model):
                    cache = XKVCache.from_factors(loaded.model, factors, recipe.selection)
                    other = predictions(loaded.model, cache, probes)
                found[key] = {
                    "ratio": factors.bytes_full / size,
                    "right": _right(other, probes, expected),
                    "kl": compare_distributions(base, other)[1],
                    **_errors(exact, factors),
                }
    return found


def _questions(
    loaded: LoadedModel, number: int, arguments: argparse.Namespace
) -> tuple[list[int], list[Probe], list[list[int]]]:
    """Token ids of a document, probes of the questions about it, and the replies expected."""

    def measure(text: str) -> int:
        return len(loaded.tokenizer(text, add_special_tokens=False).input_ids)

    room = Room(arguments.tokens, measure, lambda text, question: measure(text))
    made = find_tasks(["demo_documents"])[0].make(
        random.Random(f"coding {number}"), room, arguments.questions
    )
    renderer = Renderer(loaded.tokenizer)
    prefix = list(renderer.prefix(made.document))
    probes, replies = [], []
    for question in made.questions:
        prompt = renderer.prompt(made.document, [], question.text)
        reply = list(renderer.reply(question.expected[0]))
        probes.append(Probe(tuple(prompt[len(prefix) :] + reply), len(reply) + 1))
        replies.append(reply)
    return prefix, probes, replies


def _right(logits: torch.Tensor, probes: Sequence[Probe], expected: Sequence[Sequence[int]]) -> float:
    parts = torch.split(logits.argmax(-1), [probe.counted for probe in probes])
    return fmean(part[:-1].tolist() == list(reply) for part, reply in zip(parts, expected, strict=True))


def _coded(
    loaded: LoadedModel, exact: Prefill, spec: CompressionSpec, calibration: Any, coding: Coding
) -> tuple[PrefixFactors, float]:
    """The factors of the coding, and bytes stored: no more than today's way takes for `spec`."""
    use = rotary_tables(exact)[1]

    def size(ratio: float) -> tuple[float, CompressionSpec]:
        asked = replace(spec, ratio=ratio)
        found = size_of(exact.layout, exact.tokens, asked, use, calibration)
        return found.bytes_stored + coding.bytes(found.groups, exact.tokens, asked), asked

    budget = size_of(exact.layout, exact.tokens, spec, use, calibration).bytes_stored
    with _coding(coding):
        best = spec if coding is TODAY else _closest(size, spec, budget)
        taken = size(best.ratio or 0)[0]
        factors, _ = factorize_prefill(loaded.model, exact, best, calibration)
    return _rounded(factors, coding), taken


def _closest(
    size: Callable[[float], tuple[float, CompressionSpec]], spec: CompressionSpec, budget: float
) -> CompressionSpec:
    """The spec of most bytes within the budget."""
    assert spec.ratio is not None
    low, high = max(1.0, spec.ratio / 3), spec.ratio * 3
    best = None
    for _ in range(_SEARCH):
        middle = (low * high) ** 0.5
        try:
            taken, asked = size(middle)
        except RatioUnreachable:
            high = middle
            continue
        if taken <= budget:
            best, high = asked, middle
        else:
            low = middle
    if best is None:
        raise RatioUnreachable("no ratio takes so few bytes")
    return best


@contextmanager
def _coding(coding: Coding) -> Iterator[None]:
    """Have factors made with the coding's own rounding, and bits chosen at its own price of a column."""
    with ExitStack() as stack:
        if coding.quantize is not None:
            for module in (group_factors, projected_factors):
                stack.enter_context(patch.object(module, "quantize_runs", coding.quantize))
        stack.enter_context(patch.object(plan, "_base_bits", lambda spec: coding.base_bits))
        yield


def _rounded(factors: PrefixFactors, coding: Coding) -> PrefixFactors:
    def pair(one: LowRank, columns: Runs) -> LowRank:
        runs = runs_of(factors.spec, one.rank, columns)
        if coding.bases is None:
            return one
        return replace(one, directions=coding.bases(one.bases, runs), scales=None, shared=None)

    groups = tuple(
        replace(
            group,
            keys=pair(group.keys, group.layout.columns_k),
            values=None if group.values is None else pair(group.values, group.layout.columns_v),
        )
        for group in factors.groups
    )
    landmarks = factors.landmarks
    if coding.landmarks is not None:
        landmarks = {layer: coding.landmarks(one) for layer, one in landmarks.items()}
    return replace(factors, groups=groups, landmarks=landmarks)


def _errors(exact: Prefill, factors: PrefixFactors) -> dict[str, float]:
    lost, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for layer in factors.layers:
        wanted = exact.keys(layer, 0, exact.tokens, dtype=torch.float32), exact.values(layer, 0, exact.tokens)
        for place, (want, have) in enumerate(zip(wanted, rebuild(factors, layer), strict=True)):
            lost[place] += (want.float() - have.float()).square().sum(dtype=torch.float64)
            total[place] += want.float().square().sum(dtype=torch.float64)
    key_error, value_error = (lost / total).sqrt().tolist()
    return {"key_error": key_error, "value_error": value_error}


if __name__ == "__main__":
    main()
