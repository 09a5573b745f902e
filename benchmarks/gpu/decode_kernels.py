"""The decode kernels on one GPU: checked against their references, then timed against full attention.

python benchmarks/gpu/decode_kernels.py --out OUT/decode_kernels.json             # checks, and the main table
python benchmarks/gpu/decode_kernels.py --sweep --batches 32 --tokens 128 --out OUT/sweep.json
TRITON_INTERPRET=1 python benchmarks/gpu/decode_kernels.py --smoke --out smoke.json       # small, on a CPU

Random numbers in the shapes of Llama-3.1-8B, one layer's kernels in a CUDA graph over enough layers that no
cache holds them. A row is one stage: its time, the fewest bytes it must move, and what that is a second.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import synthetic
from report import Report, command

from xkv_service.kernels.decode_attention import DecodeAttention, Tiles
from xkv_service.kernels.decode_plainly import (
    choose_plainly,
    factors_of,
    index_shares_plainly,
    latent_values_plainly,
    projected_output_plainly,
    rebuilt_scores_plainly,
    tail_attention_plainly,
)
from xkv_service.kernels.document_table import DocumentTable, read_by_scores
from xkv_service.kernels.projected_output import projected_output
from xkv_service.kernels.rebuilt_scores import rebuilt_scores
from xkv_service.kernels.tail_attention import tail_attention
from xkv_service.kernels.tail_table import TailTable

_ROTATED = 400 * 2**20
"""Bytes that the layers of one graph read at least: several times an L2 cache."""
_TAIL = 128
_FINE = 2**20
"""Bins of shares so narrow that a choice by them is one of the best tokens."""
# Of bfloat16 kernels against float32 references.
_TOLERANCE = 2e-2
SWEEP: dict[str, list[dict[str, int]]] = {
    "index": [
        {"tile": tile, "tiles": tiles, "warps": warps}
        for tile, tiles, warps in itertools.product((64, 128, 256), (1, 2, 4, 8), (1, 2, 4))
        if 64 <= tile // warps <= 128
    ],
    "landmarks": [
        {"tile": tile, "warps": warps}
        for tile, warps in itertools.product((32, 64, 128, 256), (2, 4, 8))
        if tile // warps >= 16
    ],
    "choose": [{"block": block} for block in (1024, 2048, 4096, 8192)],
    "scores": [
        {"slots": slots, "step": step, "together": together, "warps": warps, "stages": stages}
        for slots, step, (together, warps), stages in itertools.product(
            (64, 128), (32, 64), ((1, 4), (1, 8), (2, 4), (2, 8)), (2, 3, 4, 5)
        )
        if slots * together // warps <= 32 and slots // warps >= 16
    ],
    "values": [
        {"slots": slots, "columns": columns, "warps": warps, "stages": stages}
        for slots, columns, warps, stages in itertools.product(
            (32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4)
        )
    ],
    "splits": [{"splits": splits} for splits in (1, 2, 4, 8, 16)],
    "output": [
        {"columns": columns, "step": step, "warps": warps}
        for columns, step, warps in itertools.product((32, 64, 128), (32, 64), (2, 4))
    ],
}


class Case:
    """One batch: sessions over separate documents, or all over one."""

    def __init__(
        self, shape: synthetic.Shape, kind: synthetic.Kind, batch: int, tokens: int, budget: int,
        shared: bool, device: torch.device, layers: int,
    ) -> None:  # fmt: skip
        self.shape, self.batch, self.tokens, self.budget, self.device = shape, batch, tokens, budget, device
        self.budget -= budget % (kind.chunk or 1)  # of whole chunks
        self.documents = synthetic.Documents(
            shape, kind, tokens, 1 if shared else batch, device, layers=layers
        )
        by_layer = [layer * batch if shared else layer for layer in self.documents.by_layer]
        self.tables = [DocumentTable(layer, [self.budget] * batch) for layer in by_layer]
        self.most = min(tokens, budget + synthetic.RECENT)
        self.turns = synthetic.turns(shape, tokens + 1024, device)
        self.scaling = shape.dim**-0.5
        self.query = torch.randn(batch, shape.query_heads, shape.dim, dtype=torch.bfloat16, device=device)
        size = (batch, shape.kv_heads, 2 * _TAIL, shape.dim)
        self.keys, self.values = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.lengths = torch.full((batch,), _TAIL, dtype=torch.int32, device=device)
        self.out = torch.empty_like(self.query)

    def attention(self, tiles: Tiles | None = None) -> DecodeAttention:
        """The kernels for this batch."""
        return DecodeAttention(
            self.tables[0], self.shape.query_heads, self.shape.dim, self.shape.dim, self.tokens, self.most,
            self.turns, self.scaling, tiles=tiles,
        )  # fmt: skip

    def stages(self, layer: DecodeAttention) -> dict[str, Callable[[DocumentTable], Any]]:
        """Every stage by name, as a function of a table."""
        scores = {"interleaved": False, **layer.tiles.scores}
        tail = (self.query, TailTable.of_rooms(self.keys, self.values), self.lengths)
        return {
            "tail": lambda table: tail_attention(*tail, layer._rest, layer._rest_log, self.scaling),
            "index": lambda table: layer.index(self.query, layer._rest_log, table),
            "choose": lambda table: layer.chosen(layer.index.shares, table),
            "scores": lambda table: rebuilt_scores(
                self.query, layer.chosen, table, self.turns, layer.scores, self.scaling, **scores
            ),
            "values": lambda table: layer.values(layer.scores, layer.chosen, table, **layer.tiles.values),
            "output": lambda table: projected_output(
                layer.values, layer._rest, layer._rest_log, table, self.out, **layer.tiles.output
            ),
            "all": lambda table: layer(*tail, table, self.out),
        }

    def floors(self, rebuilt: int) -> dict[str, tuple[float, float]]:
        """Fewest bytes and floating-point operations of each stage and layer.

        Args:
            rebuilt: tokens of all sessions' lists.
        """
        shape, table = self.shape, self.tables[0]
        documents = len({int(address) for address in table.key_rows.tolist()})
        width = shape.kv_heads * shape.dim
        keys, values = (rows.layout for rows in (table.documents[0].key_rows, table.documents[0].value_rows))
        bases = documents if self.documents.kind.shared is False else 1
        index = documents * sum(one.nbytes for one in read_by_scores(table.documents[0].index))
        passes = 1 if self.documents.kind.chunk else 2
        kept = rebuilt * shape.query_heads * 4
        found = {
            "tail": (self.batch * _TAIL * shape.full_bytes, 0.0),
            "index": (passes * index, 0.0),
            "choose": (self.batch * self.tokens * 4 / table.index_layout.unit, 0.0),
            "scores": (
                rebuilt * keys.stride + bases * keys.rank * width * 2 + kept,
                2.0 * rebuilt * keys.rank * width,
            ),
            "values": (
                rebuilt * values.stride + kept,
                2.0 * rebuilt * shape.query_heads * values.rank,
            ),
            "output": (
                bases * values.rank * width * 2,
                2.0 * self.batch * shape.query_heads * values.rank * shape.dim,
            ),
        }
        found["all"] = (sum(one for one, _ in found.values()), sum(one for _, one in found.values()))
        return found


def main() -> None:
    """Check, measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    torch.manual_seed(0)
    report = Report("decode_kernels", command(), "scaled_dot_product_attention over the whole cache")
    checked = list(_checks(arguments, device))
    wrong = [row for row in checked if not row["error"] < _TOLERANCE]
    for row in checked:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    extra: dict[str, Any] = {"checks": checked, "ceilings": ceilings(device), "tolerance": _TOLERANCE}
    if not wrong or arguments.anyway:
        for row in _sweep(arguments, device) if arguments.sweep else _rows(arguments, device):
            report.add(**row)
            if time.monotonic() - started > arguments.seconds:
                print(f"stopped after {arguments.seconds} s", flush=True)
                extra["stopped"] = True
                break
    report.write(arguments.out, **extra)
    if wrong:
        sys.exit(f"{len(wrong)} checks failed: {', '.join(row['check'] for row in wrong)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", default="1,8,32,64", help="sessions, comma-separated")
    parser.add_argument("--tokens", default="64,128", help="thousands of tokens, comma-separated")
    parser.add_argument("--kinds", default="bf16,8x,20x,mixed20", help="how factors and index are stored")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a session chooses")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after so long")
    parser.add_argument("--separate", action="store_true", help="leave out sessions that share a document")
    parser.add_argument("--sweep", action="store_true", help="time options of each kernel instead")
    parser.add_argument("--only", default=",".join(SWEEP), help="kernels to sweep")
    parser.add_argument("--anyway", action="store_true", help="measure although a check failed")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks this script")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[dict[str, Any], Case]]:
    """Every batch to be measured, one at a time: the memory of one is free before the next is made."""
    shape = synthetic.SMOKE if arguments.smoke else synthetic.LLAMA_8B
    lengths = [160] if arguments.smoke else [1024 * int(one) for one in arguments.tokens.split(",")]
    batches = [1, 2] if arguments.smoke else [int(one) for one in arguments.batches.split(",")]
    for tokens, name, batch in itertools.product(lengths, arguments.kinds.split(","), batches):
        for shared in (False, True) if batch > 1 and not arguments.separate else (False,):
            count = 1 if shared else batch
            index = count * tokens * shape.kv_heads * (shape.planes + 2)
            layers = 1 if arguments.smoke else min(shape.layers, -(-_ROTATED // index))
            budget = 24 if arguments.smoke else arguments.budget
            row = {"tokens": tokens, "factors": name, "batch": batch, "documents": count}
            try:
                kind = synthetic.kind_of(name, shape, tokens)
                yield row, Case(shape, kind, batch, tokens, budget, shared, device, layers)
            except torch.OutOfMemoryError:
                print(f"out of memory: {row}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    full: dict[tuple[int, int], float] = {}
    for row, case in _cases(arguments, device):
        key = (row["tokens"], row["batch"])
        if key not in full:
            full[key] = _full_attention(case)
            moved = case.batch * case.tokens * case.shape.full_bytes
            yield {
                "tokens": key[0], "factors": "full", "batch": key[1], "documents": key[1], "stage": "all",
                "us": 1e6 * full[key], "MB": moved / 1e6, "TB/s": moved / full[key] / 1e12,
            }  # fmt: skip
        layer = case.attention()
        stages = case.stages(layer)
        stages["all"](case.tables[0])
        rebuilt = int(layer.chosen.counts.sum())
        floors = case.floors(rebuilt)
        for name, stage in stages.items():
            took = _over_layers(case, stage)
            moved, operations = floors[name]
            yield {
                **row, "stage": name, "us": 1e6 * took, "MB": moved / 1e6, "TB/s": moved / took / 1e12,
                "TFLOP/s": operations / took / 1e12, "rebuilt": rebuilt,
                **({"times_full": full[key] / took} if name == "all" else {}),
            }  # fmt: skip


def _sweep(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    wanted = arguments.only.split(",")
    for row, case in _cases(arguments, device):
        marked = case.documents.kind.chunk > 0
        for name in wanted:
            if name in ("index", "landmarks") and (name == "landmarks") != marked:
                continue
            best: dict[str, Any] | None = None
            for options in SWEEP[name][:2] if arguments.smoke else SWEEP[name]:
                found = {**row, "stage": name, **options, **_swept(case, name, options)}
                if "us" in found and (best is None or found["us"] < best["us"]):
                    best = found
                yield found
            print(f"best: {best}", flush=True)


def _swept(case: Case, name: str, options: dict[str, int]) -> dict[str, Any]:
    """Microseconds of one stage with options, or why there are none."""
    name = "index" if name == "landmarks" else name
    tiles, stage = replace(Tiles(), **({} if name == "splits" else {name: options})), name
    if name == "splits":
        tiles, stage = replace(Tiles(), splits=options["splits"]), "values"
    try:
        layer = case.attention(tiles)
        stages = case.stages(layer)
        stages["all"](case.tables[0])
        took = _over_layers(case, stages[stage], 10)
        beside = {"output_us": 1e6 * _over_layers(case, stages["output"])} if name == "splits" else {}
        return {"us": 1e6 * took, **beside}
    except Exception as error:  # noqa: BLE001 - a tile may need more shared memory than there is
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:80]}


def _over_layers(case: Case, stage: Callable[[DocumentTable], Any], repeats: int = 20) -> float:
    def every() -> None:
        for table in case.tables:
            stage(table)

    return synthetic.timed(every, case.device, repeats) / len(case.tables)


def _full_attention(case: Case) -> float:
    """Seconds of one layer's attention over whole keys and values, in the fastest backend there is."""
    shape, device = case.shape, case.device
    size = (case.batch, shape.kv_heads, case.tokens + _TAIL, shape.dim)
    keys, values = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    query = case.query[:, :, None]
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    times = []
    for backend in backends if device.type == "cuda" else [SDPBackend.MATH]:
        try:
            with sdpa_kernel(backend):
                run = lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)
                times.append(synthetic.timed(run, device))
        except RuntimeError as error:
            print(f"{backend}: {error}", flush=True)
    return min(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """TB/s of a copy (read and written) and TFLOP/s of a bfloat16 product."""
    size = 2**31 if device.type == "cuda" else 2**22
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = synthetic.timed(lambda: target.copy_(source), device)
    edge = 8192 if device.type == "cuda" else 128
    left, right = (torch.randn(edge, edge, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = synthetic.timed(lambda: left @ right, device)
    found = {"copy_TB/s": 2 * size / copied / 1e12, "product_TFLOP/s": 2 * edge**3 / multiplied / 1e12}
    print("  ".join(f"{name}={value:.3g}" for name, value in found.items()), flush=True)
    return found


def _checks(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Relative error of every stage on fresh random input, and of the layer; the index of long documents."""
    shape = synthetic.SMOKE if arguments.smoke else synthetic.LLAMA_8B
    tokens, budget = (160, 24) if arguments.smoke else (3000, 500)
    for name, shared in itertools.product((*synthetic.KINDS, "8x" + synthetic.MARKED), (False, True)):
        kind = synthetic.kind_of(name, shape, 65536)  # the ranks of such a document
        case = Case(shape, kind, 3, tokens, budget, shared, device, 1)
        layer = case.attention()
        for made in (layer.scores, layer.values.latents, layer._rest, layer.index.shares, case.out):
            made.fill_(torch.nan)
        case.stages(layer)["all"](case.tables[0])
        for stage, error in _errors(case, layer).items():
            yield {"check": f"{name}, {'one document' if shared else 'separate'}, {stage}", "error": error}
    # few tokens of all sessions are scored by other tiles than many
    for name, sessions in itertools.product(("8x", "8x" + synthetic.MARKED), (1, 2)):
        for stage, error in _long_index(shape, name, sessions, device).items():
            yield {"check": f"long documents, {name}, sessions: {sessions}, {stage}", "error": error}
    if device.type == "cuda":
        yield {"check": "gather past 2^31 elements", "error": _far_gather(device)}
        yield {"check": "landmarks past 2^31 elements", "error": _far_landmarks(device)}


def _errors(case: Case, layer: DecodeAttention) -> dict[str, float]:
    found: dict[str, float] = {}
    rest, rest_log = tail_attention_plainly(case.query, case.keys, case.values, case.lengths, case.scaling)
    found["tail"] = _relative(layer._rest, rest)
    for session, document in enumerate(case.tables[0].documents):
        query, count = case.query[session], int(layer.chosen.counts[session])
        positions = layer.chosen.positions[session, :count]
        shares = index_shares_plainly(query, rest_log[session], document, case.scaling)
        unit = document.index_layout.unit
        best = choose_plainly(shares, document.states, case.budget, _FINE, unit)
        assert unit > 1 or count == len(best), "the budget is not spent"
        both, times = torch.cat((positions, best)).unique(return_counts=True)
        exchanged = shares[both[times == 1].long() // unit]
        choice = float(exchanged.max() - exchanged.min()) / 4 if len(exchanged) else 0.0
        scores = rebuilt_scores_plainly(query, document, positions, case.turns, case.scaling)
        latents = latent_values_plainly(scores, document, positions)
        parts = {
            "choice": choice,
            "shares": _relative(layer.index.shares[session, : len(shares)], shares),
            "scores": _relative(layer.scores[session, :, :count], scores),
            "output": _relative(
                case.out[session],
                projected_output_plainly(*latents, rest[session], rest_log[session], document),
            ),
        }
        found |= {name: _worse(found.get(name, 0.0), error) for name, error in parts.items()}
    return found


def _long_index(shape: synthetic.Shape, name: str, sessions: int, device: torch.device) -> dict[str, float]:
    """Largest error of a share, in nats, and 1 where a choice by these shares is another: of 131,072 tokens.

    Their sums are read in four parts. In small, tiles are so small that there are two, but of landmarks one.
    """
    small = shape == synthetic.SMOKE
    tokens, budget = (1500, 200) if small else (2**17, 2048)
    kind = synthetic.kind_of(name, shape, tokens)
    index = {"tile": 16} if kind.chunk else {"tile": 16, "tiles": 1}
    tiles = Tiles(index=index, choose={"block": 128}) if small else None
    case = Case(shape, kind, sessions, tokens, budget, False, device, 1)
    layer, table = case.attention(tiles), case.tables[0]
    layer.index.shares.fill_(torch.nan)
    stages = case.stages(layer)
    for name in ("tail", "index", "choose"):
        stages[name](table)
    _, rest_log = tail_attention_plainly(case.query, case.keys, case.values, case.lengths, case.scaling)
    found = {"shares": 0.0, "choice": 0.0}
    for session, document in enumerate(table.documents):
        expected = index_shares_plainly(case.query[session], rest_log[session], document, case.scaling)
        shares, unit = layer.index.shares[session, : len(expected)], document.index_layout.unit
        found["shares"] = _worse(found["shares"], float((shares - expected).abs().max()))
        chosen = layer.chosen.positions[session, : int(layer.chosen.counts[session])]
        best = choose_plainly(shares, document.states, case.budget, layer.chosen._bins, unit)
        found["choice"] = max(found["choice"], float(not torch.equal(chosen, best)))
    return found


def _worse(one: float, other: float) -> float:
    """The larger error; NaN, which `max` may drop, is worse than any."""
    return float(torch.tensor([one, other], dtype=torch.float64).amax())


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _far_gather(device: torch.device) -> float:
    """Scores of the last tokens of a document whose factors have more than 2^31 elements."""
    shape = replace(synthetic.LLAMA_8B, layers=1)
    kind, tokens = synthetic.Kind("bf16", torch.bfloat16, (512, 64)), 2**22 + 4096
    case = Case(shape, kind, 1, tokens, 64, False, device, 1)
    layer, document = case.attention(), case.tables[0].documents[0]
    assert document.key_rows.data.numel() > 2**32
    case.stages(layer)["all"](case.tables[0])
    count = int(layer.chosen.counts[0])
    positions = layer.chosen.positions[0, :count]
    assert int(positions[-1]) == tokens - 1 and factors_of(document.key_rows, positions).isfinite().all()
    expected = rebuilt_scores_plainly(case.query[0], document, positions, case.turns, case.scaling)
    return _relative(layer.scores[0, :, :count], expected)


def _far_landmarks(device: torch.device) -> float:
    """Largest error of a share, in nats, of a document whose landmarks have more than 2^31 elements."""
    kind = synthetic.Kind("bf16", torch.bfloat16, (64, 64), chunk=1)
    case = Case(synthetic.LLAMA_8B, kind, 1, 2**21 + 64, 64, False, device, 1)
    layer, document = case.attention(), case.tables[0].documents[0]
    assert read_by_scores(document.index)[0].numel() > 2**31
    stages = case.stages(layer)
    for name in ("tail", "index"):
        stages[name](case.tables[0])
    expected = index_shares_plainly(case.query[0], layer._rest_log[0], document, case.scaling)
    return float((layer.index.shares[0] - expected).abs().max())


if __name__ == "__main__":
    main()
