"""The kernel of sessions on one rebuilt document: checked, then timed against PyTorch and its floors.

python benchmarks/gpu/shared_attention.py --out OUT/shared_attention.json
TRITON_INTERPRET=1 python benchmarks/gpu/shared_attention.py --smoke --out smoke.json       # small, on a CPU

One layer of Llama-3.1-8B's shapes, random numbers, in a CUDA graph over as many layers as no cache holds.
"shared" is what the engine runs: cuDNN over most of a long document, the kernel over the rest; "kernel" is
the kernel alone. Both merge their parts with the tail's, which for FlashAttention and cuDNN ("cascade") is
not counted. The floor is the longer of reading the document once at the memory's 3.1 TB/s and of the products
at the rate of a large product.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import cascade
import synthetic
from decode_kernels import ceilings
from report import Report, command

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.decode_plainly import shared_attention_plainly
from xkv_service.kernels.shared_attention import Document, Shape, SharedAttention, SharedGroups

_ROTATED = 400 * 2**20
"""Bytes of documents that one graph reads at least: several times an L2 cache."""
_MEMORY = 3.1e12
"""Bytes a second that an H100's memory was seen to give at most (`decode_kernels.py`)."""
_TOLERANCE = 1e-2
"""Of bfloat16 weights and sums against float32."""
_NOTHING = -1.0e30
"""The log of a tail without tokens."""


class Case:
    """Sessions on one document: its keys and values in several layers, and their queries."""

    def __init__(self, shape: synthetic.Shape, tokens: int, batch: int, device: torch.device) -> None:
        self.shape, self.tokens, self.batch, self.device = shape, tokens, batch, device
        self.nbytes = tokens * shape.full_bytes
        size = (1, shape.kv_heads, tokens, shape.dim)
        self.layers = [
            tuple(torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
            for _ in range(max(2, -(-_ROTATED // self.nbytes)))
        ]
        self.query = torch.randn(batch, shape.query_heads, shape.dim, dtype=torch.bfloat16, device=device)
        self.scaling = shape.dim**-0.5

    def sides(self) -> dict[str, Callable[[int], tuple[torch.Tensor, torch.Tensor]]]:
        """By name, attention in a layer: what came of it, and logs."""
        rows = cascade.rows_of(self.query, self.shape.kv_heads)

        def over(parts: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
            return lambda layer: cascade.over_document(rows, *self.layers[layer], parts)

        own = {"shared": self._shared(alone=False), "kernel": self._shared(alone=True)}
        return own | {name: over(parts) for name, parts in cascade.PARTS.items()}

    def _shared(self, *, alone: bool) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        shape, group = self.shape, self.shape.query_heads // self.shape.kv_heads
        states = {layer: States(keys[0], values[0]) for layer, (keys, values) in enumerate(self.layers)}
        document = Document(0, states, self.tokens)
        groups = Shape.of([(document, self.batch)], group)
        groups = replace(groups, fixed=(), kernel=True) if alone else groups
        tables = SharedGroups(groups, self.device)
        tables.overwrite([(document, range(self.batch))])
        attention = SharedAttention(
            groups, shape.kv_heads, group, shape.dim, shape.dim, torch.bfloat16, self.device
        )
        rest = torch.zeros(self.batch, shape.query_heads, shape.dim, device=self.device)
        log = torch.full((self.batch, shape.query_heads), _NOTHING, device=self.device)

        def attend(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            attention(self.query, tables, layer, rest, log, self.scaling)
            return rest, log

        return attend

    def error(self, name: str) -> float:
        """Relative error of a side in the last layer against softmax in float32; of three sessions."""
        layer = len(self.layers) - 1
        found, log = self.sides()[name](layer)
        rest = torch.zeros(self.batch, self.shape.query_heads, self.shape.dim, device=self.device)
        if name in cascade.PARTS:
            found = cascade.merged(found.float(), log, rest, torch.full_like(rest[..., 0], _NOTHING))
        keys, values = (one[0] for one in self.layers[layer])
        worst = 0.0
        for session in {0, self.batch // 2, self.batch - 1}:
            nothing = torch.full_like(rest[session, :, 0], _NOTHING)
            expected, _ = shared_attention_plainly(
                self.query[session], keys, values, rest[session], nothing, self.scaling
            )
            worst = max(worst, float((found[session] - expected).norm() / expected.norm()))
        return worst

    @property
    def operations(self) -> float:
        """Floating-point operations of a layer's two products."""
        return 4.0 * self.batch * self.shape.query_heads * self.shape.dim * self.tokens


def main() -> None:
    """Check, measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    report = Report(
        "shared_attention", command(), "the fastest of FlashAttention and cuDNN over the whole cache"
    )
    limits = ceilings(device)
    for row in _rows(arguments, device, limits):
        report.add(**row)
    report.write(arguments.out, ceilings=limits, tolerance=_TOLERANCE)
    wrong = [row for row in report.rows if not row["error"] < _TOLERANCE]
    if wrong:
        sys.exit(f"wrong: {wrong}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", default="1,8,32,128", help="sessions, comma-separated")
    parser.add_argument("--tokens", default="8,16,32,64,128", help="thousands of tokens, comma-separated")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks this script")
    return parser.parse_args()


def _rows(
    arguments: argparse.Namespace, device: torch.device, limits: dict[str, float]
) -> Iterator[dict[str, Any]]:
    shape = synthetic.SMOKE if arguments.smoke else synthetic.LLAMA_8B
    lengths = [160] if arguments.smoke else [1024 * int(one) for one in arguments.tokens.split(",")]
    batches = [1, 3] if arguments.smoke else [int(one) for one in arguments.batches.split(",")]
    for tokens, batch in itertools.product(lengths, batches):
        case = Case(shape, tokens, batch, device)
        names = ["shared", "kernel", *(cascade.PARTS if device.type == "cuda" else ())]
        took = {name: _seconds(case, name) for name in names}
        whole = min((took[name] for name in names if name in cascade.PARTS), default=took["kernel"])
        floor = max(case.nbytes / _MEMORY, case.operations / limits["product_TFLOP/s"] / 1e12)
        for name in names:
            yield {
                "tokens": tokens, "batch": batch, "side": name, "us": 1e6 * took[name],
                "floor_us": 1e6 * floor, "of_floor": took[name] / floor,
                "TB/s": case.nbytes / took[name] / 1e12, "TFLOP/s": case.operations / took[name] / 1e12,
                "times_whole": whole / took[name], "error": case.error(name),
            }  # fmt: skip
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _seconds(case: Case, name: str) -> float:
    side = case.sides()[name]

    def every() -> None:
        for layer in range(len(case.layers)):
            side(layer)

    return synthetic.timed(every, case.device) / len(case.layers)


if __name__ == "__main__":
    main()
