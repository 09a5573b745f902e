"""What each way of selecting tokens costs and is worth: answers, bytes of the index, time of a decode step.

python benchmarks/selection.py --out benchmarks/results/selection.json

All rows share one factorization (8x, groups of 4, no index stored) and the same questions; only the index and
the choice of tokens differ. Every query token selects for itself, the question's included. An answer is right
when greedy decoding gives the expected text, character for character. `--part 1/8` measures every eighth
document, `--merge FILES` adds parts up.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from bundled import measure_of
from report import Report, command, measured_on

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, enable_xkv
from xkv_service.compression import factorize_prefill
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import LandmarkScorer, Scorer
from xkv_service.demo import demo_model_path, ruler_tasks
from xkv_service.evaluation import Chat
from xkv_service.evaluation.tasks.base import Room, Sample
from xkv_service.evaluation.tasks.registry import find_tasks
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.landmarks import Landmarks, landmarks
from xkv_service.selection.sketch import candidate_planes, choose_planes
from xkv_service.selection.spec import Granularity, SelectorKind

NEEDLES = tuple(f"demo_{name}" for name in ruler_tasks.TASKS)
SETS = {"documents": ("demo_documents",), "needles": NEEDLES}
Index = Callable[[Prefill, int], Scorer]


@dataclass(frozen=True)
class Row:
    """One way to select: what it is called, its index (None: exact scores or none), and the choice."""

    name: str
    spec: SelectionSpec
    index: Index | None = None
    bytes: float = 0.0
    outliers: int = 0


class PlainSketch:
    """A key sketch of any number of bits, kept as floating point: what is measured is its rounding."""

    unit = 1

    def __init__(self, keys: torch.Tensor, planes: torch.Tensor, bits: int) -> None:
        self.dims = planes.long().flatten(1)
        picked = keys.float().gather(-1, self.dims.expand(keys.shape[0], -1, -1))
        levels = 2 ** (bits - 1) - 1
        scale = (picked.abs().amax(-1, keepdim=True) / levels).half().float().clamp_min(1e-30)
        self.kept = ((picked / scale).round().clamp(-levels, levels) * scale).permute(1, 2, 0).contiguous()

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        index = self.dims[:, None].expand(-1, queries.shape[1], -1)
        return queries.float().gather(-1, index) @ self.kept


def sketch(planes: int, bits: int, *, queries: bool = True) -> tuple[Index, float]:
    """A sketch of so many planes, chosen by key energy, times that of the prefix's queries or not."""

    def build(exact: Prefill, layer: int) -> Scorer:
        keys = exact.rotated_keys(layer)
        energy = exact.query_energy(layer)
        chosen = choose_planes(
            keys.float().square().mean(0),
            energy if queries else torch.ones_like(energy),
            candidate_planes(exact.planes(layer), keys.shape[-1]),
            planes,
        )
        return PlainSketch(keys, chosen, bits)

    return build, 2 * planes * bits / 8 + 2


def landmark(chunk: int) -> tuple[Index, float]:
    """The paper's landmarks of `chunk` tokens."""

    def build(exact: Prefill, layer: int) -> Scorer:
        return LandmarkScorer(Landmarks(landmarks(exact.rotated_keys(layer), chunk), chunk))

    return build, 128 / chunk


def _spec(
    selector: SelectorKind, budget: int = 1, granularity: Granularity = "layer", **always: int
) -> SelectionSpec:
    """A selection of the index alone, unless `always` says more."""
    return SelectionSpec(selector, budget, granularity, **{"recent": 0, **always})


def rows() -> Iterator[Row]:
    """Everything measured."""
    yield Row("every token", _spec("dense"))
    for budget in (16, 64, 256):
        yield Row("exact scores", _spec("exact", budget))
    for budget in (32, 64, 128, 256, 512):
        yield Row("sketch, 8 planes, 4 bits", _spec("sketch", budget), *sketch(8, 4))
    for budget in (64, 256):
        per_head = _spec("sketch", budget, "head")
        yield Row("sketch, 8 planes, 4 bits", per_head, *sketch(8, 4))
    for planes, bits in ((2, 4), (4, 4), (6, 4), (12, 4), (16, 4), (8, 2), (8, 3), (8, 8), (16, 2)):
        for budget in (64, 256):
            index = sketch(planes, bits)
            yield Row(f"sketch, {planes} planes, {bits} bits", _spec("sketch", budget), *index)
    for planes in (4, 8):
        index = sketch(planes, 4, queries=False)
        yield Row(f"sketch, {planes} planes by key energy", _spec("sketch", 256), *index)
    for chunk in (4, 8, 16):
        yield Row(f"landmarks of {chunk}", _spec("landmark", 256), *landmark(chunk))
    for budget in (256, 512, 1024):
        yield Row("landmarks of 8", _spec("landmark", budget, "head"), *landmark(8))
    for granularity in ("layer", "head"):
        spec = _spec("landmark", 256, granularity)
        yield Row("landmarks of 8, 16 outlier chunks", spec, *landmark(8), outliers=16)
    yield Row("sketch, 4 planes, 16 outlier chunks", _spec("sketch", 64), *sketch(4, 4), outliers=16)
    yield Row("sketch, 8 planes and the last 32 tokens", _spec("sketch", 224, recent=32), *sketch(8, 4))
    recent = _spec("sketch", 64, sink=16, recent=64)
    yield Row("sketch, 8 planes, 16 first and 64 last tokens", recent, *sketch(8, 4))


def main() -> None:
    """Measure or merge; print a table, write JSON. Or draw what was written."""
    arguments = _arguments()
    if arguments.draw:
        _draw(json.loads(arguments.draw.read_text())["rows"], arguments.plot)
        return
    if arguments.merge:
        parts = [json.loads(path.read_text()) for path in arguments.merge]
        counts = _merged([part["counts"] for part in parts])
    else:
        torch.set_num_threads(1)
        counts = _measured(load_model(arguments.model, device=arguments.device), arguments)
    report = Report("selection", command(arguments.merge), "every token")
    for count in counts:
        report.add(**_row(count))
    # What parts are merged by; a merged file has the rows.
    counts = [] if arguments.merge else counts
    if arguments.plot:
        _draw(report.rows, arguments.plot)
    report.write(arguments.out, counts=counts, tokens=arguments.tokens, **measured_on(arguments.merge))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a document")
    parser.add_argument("--documents", type=int, default=26, help="documents of each set")
    parser.add_argument("--questions", type=int, default=20, help="questions on each")
    parser.add_argument("--rows", default="", help="measure only rows whose name matches this expression")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th document")
    parser.add_argument("--plot", type=Path, help="draw answers against the budget, as PNG")
    parser.add_argument("--merge", type=Path, nargs="+", help="parts to add up instead of measuring")
    parser.add_argument("--draw", type=Path, help="written results to draw instead of measuring")
    arguments = parser.parse_args()
    if arguments.draw and not arguments.plot:
        parser.error("--draw needs --plot, the PNG to write")
    return arguments


def _measured(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    part, parts = map(int, arguments.part.split("/"))
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    jobs = [(name, number) for name in SETS for number in range(arguments.documents)]
    for name, number in jobs[part - 1 :: parts]:
        task = SETS[name][number % len(SETS[name])]
        for row, right, asked, seconds in _document(loaded, task, number, arguments):
            known = counts.setdefault((_label(row), name), _empty(row, name))
            known["right"] += right
            known["asked"] += asked
            known["steps_ms"].append(1000 * seconds)
        print(f"{name} {number + 1}/{arguments.documents}", flush=True)
        arguments.out.write_text(json.dumps({"counts": list(counts.values())}))
    return list(counts.values())


def _label(row: Row) -> str:
    return f"{row.name}, {row.spec.budget} by {row.spec.granularity}"


def _empty(row: Row, name: str) -> dict[str, Any]:
    budget = None if row.spec.selector == "dense" else row.spec.budget
    return {
        "selection": row.name,
        "budget": budget,
        "granularity": row.spec.granularity,
        "index_bytes": row.bytes,
        "questions": name,
        "right": 0,
        "asked": 0,
        "steps_ms": [],
    }


def _document(
    loaded: LoadedModel, task: str, number: int, arguments: argparse.Namespace
) -> Iterator[tuple[Row, int, int, float]]:
    """Right answers, questions and seconds of one decode step, for every row."""
    sample = _sample(loaded, task, number, arguments)
    ids = torch.tensor(render_prefix(loaded.tokenizer, sample.document))
    model = loaded.model
    with torch.no_grad(), enable_xkv(model):
        exact = prefill(model, ids)
        prefixes = {}
        for outliers in (0, 16):
            spec = CompressionSpec(ratio=8, index="none", outlier_chunks=outliers)
            prefixes[outliers] = Prefix.of(model, factorize_prefill(model, exact, spec)[0])
        for row in (row for row in rows() if re.search(arguments.rows, _label(row))):
            prefix = prefixes[row.outliers]
            for layer, one in prefix.layers.items():
                one.index = row.index(exact, layer) if row.index else None
            yield row, *_asked(loaded, prefix, row.spec, ids, sample)


def _sample(loaded: LoadedModel, task: str, number: int, arguments: argparse.Namespace) -> Sample:
    measure = measure_of(loaded)
    room = Room(arguments.tokens, measure, lambda text, question: measure(text))
    return find_tasks([task])[0].make(Random(f"{task} {number}"), room, arguments.questions)


def _asked(
    loaded: LoadedModel, prefix: Prefix, spec: SelectionSpec, ids: torch.Tensor, sample: Sample
) -> tuple[int, int, float]:
    # The index stands in for the kind it is of.
    spec = SelectionSpec(
        "auto" if spec.selector in ("sketch", "landmark") else spec.selector,
        spec.budget,
        spec.granularity,
        spec.sink,
        spec.recent,
    )
    cache = XKVCache(prefix, spec)
    chat = Chat(loaded.model, loaded.tokenizer, cache, ids.tolist(), sample.document)
    right = 0
    for question in sample.questions:
        chat.restart()
        right += chat.ask(question.text, question.expected[0], enough=lambda text: True).right is True
    return right, len(sample.questions), _step_seconds(loaded, prefix, spec)


def _step_seconds(loaded: LoadedModel, prefix: Prefix, spec: SelectionSpec) -> float:
    cache, token = XKVCache(prefix, spec), torch.tensor([[5]], device=loaded.model.device)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        loaded.model(token, past_key_values=cache)
        if token.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[2]


def _merged(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    total: dict[tuple[Any, ...], dict[str, Any]] = {}
    for count in (count for part in parts for count in part):
        name = tuple(count[field] for field in ("selection", "budget", "granularity", "questions"))
        if name in total:
            for field in ("right", "asked", "steps_ms"):
                total[name][field] += count[field]
        else:
            total[name] = count
    return list(total.values())


def _row(count: dict[str, Any]) -> dict[str, Any]:
    share = count["right"] / count["asked"]
    steps = sorted(count["steps_ms"])
    fields = ("selection", "budget", "granularity", "index_bytes", "questions", "asked")
    return {
        **{field: count[field] for field in fields},
        "right_%": 100 * share,
        "error_%": 100 * (share * (1 - share) / count["asked"]) ** 0.5,
        "step_ms": steps[len(steps) // 2],
    }


LINES = {
    "exact scores": "exact scores",
    "sketch, 8 planes, 4 bits": "key sketch, 8 planes (10 bytes)",
    "sketch, 6 planes, 4 bits": "key sketch, 6 planes (8 bytes)",
    "sketch, 4 planes, 4 bits": "key sketch, 4 planes (6 bytes)",
    "landmarks of 8": "landmarks of 8, by KV head (16 bytes)",
}


def _draw(measured: list[dict[str, Any]], path: Path) -> None:
    """Right answers against the budget, one panel for each set of questions."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SETS), figsize=(11, 4), sharey=True)
    for axis, questions in zip(axes, SETS, strict=True):
        for name, label in LINES.items():
            by = "head" if name.startswith("landmarks") else "layer"
            mine = [row for row in measured if row["questions"] == questions and row["selection"] == name]
            points = sorted(
                (row["budget"], row["right_%"], row["error_%"]) for row in mine if row["granularity"] == by
            )
            if points:
                budgets, right, error = zip(*points, strict=True)
                axis.errorbar(budgets, right, yerr=error, marker="o", capsize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([16, 32, 64, 128, 256, 512, 1024], ["16", "32", "64", "128", "256", "512", "1,024"])
        axis.set_xlabel("tokens rebuilt of 4,096")
        axis.set_title(questions, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, %")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
