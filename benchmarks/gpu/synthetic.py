"""Documents of random numbers with a real model's shapes, as the decode kernels read them.

Nothing is learnt from what they attend to: chosen tokens lie anywhere, which is the worst case for a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from compression import LLAMA_8B as FIELDS
from transformers import LlamaConfig, LlamaForCausalLM

from xkv_service import CompressionSpec
from xkv_service.factorization.ranks import size_of
from xkv_service.kernels.document_table import ALWAYS, CHOOSABLE, DocumentLayer, read_by_scores
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.modeling.inspect import inspect_model
from xkv_service.modeling.layout import ModelLayout
from xkv_service.packed_factors import PackedFactors, Runs, packed_width
from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch

EXACT, RECENT = 4, 32
"""Tokens kept exact at a document's beginning, and rebuilt for every query at its end."""
_LEVEL = {8: 73.9, 4: 9.2, 2: 2.24}
"""Standard deviations of uniform codes."""


@dataclass(frozen=True)
class Shape:
    """Of a model: layers, groups of them, heads, and dimensions of a head."""

    layers: int
    group_size: int
    kv_heads: int
    heads_per_kv: int
    dim: int
    planes: int = 8

    @property
    def query_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.heads_per_kv

    @property
    def full_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer, 16 bits a number."""
        return 4 * self.kv_heads * self.dim


LLAMA_8B = Shape(32, 4, 8, 4, 128)
SMOKE = Shape(4, 2, 2, 2, 32)


@dataclass(frozen=True)
class Kind:
    """How a document is stored.

    Args:
        ranks: of keys and values, all columns of `dtype`; or runs: columns of mixed bits.
        shared: whether bases are a calibration's, the same for all documents.
        chunk: tokens of a landmark, in bfloat16; none: the index is a key sketch.
    """

    name: str
    dtype: torch.dtype = torch.int8
    ranks: tuple[int, int] = (0, 0)
    runs: tuple[Runs, Runs] | None = None
    shared: bool = False
    chunk: int = 0


KINDS = ("bf16", "8x", "20x", "mixed20")
MARKED = "-landmarks"
"""What a kind's name ends with whose index is landmarks of 8 tokens, not a key sketch."""
_SMOKE_KINDS = {
    "bf16": Kind("bf16", torch.bfloat16, (32, 48)),
    "8x": Kind("8x", torch.int8, (32, 48)),
    "20x": Kind("20x", torch.int8, (16, 27)),
    "mixed20": Kind("mixed20", runs=(((8, 16), (4, 24), (2, 20)), ((8, 16), (4, 32), (2, 24))), shared=True),
}


def kind_of(name: str, shape: Shape, tokens: int) -> Kind:
    """How a document of so many tokens is stored.

    "8x" and "20x" are what `compress` makes of it: int8 columns, whose ranks follow from the length. "bf16"
    has ranks of its own. "mixed20" takes 6,528 of 131,072 bits a token and group of 4 layers, over shared
    bases: how a calibration of such a model would divide them is not known; many columns have few bits, as
    in the calibrations that were made. "8x-landmarks" has the same ranks as "8x", and landmarks.
    """
    if name.endswith(MARKED):
        return replace(kind_of(name.removesuffix(MARKED), shape, tokens), name=name, chunk=8)
    if shape == SMOKE:
        return _SMOKE_KINDS[name]
    if name == "bf16":
        return Kind(name, torch.bfloat16, (512, 768))
    if name == "mixed20":
        runs = ((8, 96), (4, 256), (2, 384)), ((8, 128), (4, 416), (2, 640))
        return Kind(name, runs=runs, shared=True)
    spec = CompressionSpec(ratio=float(name.removesuffix("x")))
    group = size_of(_layout(), tokens, spec).groups[0]
    return Kind(name, torch.int8, (group.rank_k, group.rank_v))


@cache
def _layout() -> ModelLayout:
    config = LlamaConfig(**FIELDS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        return inspect_model(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16))


class Documents:
    """Documents of one kind, layer by layer.

    Args:
        count: documents. layers: how many layers, by default all of the shape's.
    """

    def __init__(
        self, shape: Shape, kind: Kind, tokens: int, count: int, device: torch.device, *,
        layers: int | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.kind, self.tokens = shape, kind, tokens
        self.layers = shape.layers if layers is None else layers
        self._device = device
        self._common = [self._bases() for _ in range(self.layers)] if kind.shared else None
        states = torch.full((tokens,), CHOOSABLE, dtype=torch.uint8, device=device)
        states[:EXACT], states[-RECENT:] = 0, ALWAYS
        self._states = states
        self.by_layer = [list(layer) for layer in zip(*(self._document() for _ in range(count)), strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all that they hold, each tensor once."""
        tensors: dict[int, int] = {}
        for layer in self.by_layer:
            for one in layer:
                for tensor in (
                    *read_by_scores(one.index), one.key_rows.data, one.value_rows.data, one.key_bases,
                    one.value_bases,
                ):  # fmt: skip
                    tensors[tensor.data_ptr()] = tensor.nbytes
        return sum(tensors.values())

    def _document(self) -> list[DocumentLayer]:
        made = []
        for layer in range(self.layers):
            if layer % self.shape.group_size == 0:
                rows = self._rows(0), self._rows(1)
            bases = self._bases() if self._common is None else self._common[layer]
            made.append(DocumentLayer(self._index(), self._states, *rows, *bases))
        return made

    def _index(self) -> KeySketch | Landmarks:
        heads, planes, device, chunk = self.shape.kv_heads, self.shape.planes, self._device, self.kind.chunk
        if chunk:
            size = (-(-self.tokens // chunk), heads, self.shape.dim)
            return Landmarks(torch.randn(size, dtype=torch.bfloat16, device=device), chunk)
        half = self.shape.dim // 2
        order = torch.stack([torch.randperm(half, device=device)[:planes] for _ in range(heads)])
        codes = torch.randint(0, 256, (self.tokens, heads, planes), dtype=torch.uint8, device=device)
        scales = (0.5 + torch.rand(self.tokens, heads, device=device)).half()
        return KeySketch(torch.stack([order, order + half], -1).to(torch.int16), codes, scales)

    def _rows(self, side: int) -> FactorRows:
        kind, device = self.kind, self._device
        if kind.runs is None:
            size = (self.tokens, kind.ranks[side])
            if kind.dtype == torch.int8:
                return FactorRows.of(torch.randint(-127, 128, size, dtype=torch.int8, device=device))
            return FactorRows.of(torch.randn(size, dtype=kind.dtype, device=device))
        pieces = []
        for bits, count in kind.runs[side]:
            size = (self.tokens, packed_width(bits, count))
            piece = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
            pieces.append(piece.view(torch.int8) if bits == 8 else piece)
        return FactorRows.of(PackedFactors(kind.runs[side], tuple(pieces)))

    def _bases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Of keys and values, and what their rows are still to be multiplied with."""
        shape, device, made, scales = self.shape, self._device, [], []
        for side in (0, 1):
            runs = self.kind.runs[side] if self.kind.runs else ((8, self.kind.ranks[side]),)
            rank = sum(count for _, count in runs)
            size = (rank, shape.kv_heads * shape.dim)
            level = 1.0 if self.kind.dtype == torch.bfloat16 or self.kind.runs else _LEVEL[8]
            made.append(torch.randn(size, dtype=torch.bfloat16, device=device) / (level * rank**0.5))
            each = torch.cat([torch.full((count,), 1 / _LEVEL[bits]) for bits, count in runs])
            scales.append(each.to(device, torch.bfloat16) if self.kind.runs else None)
        values = made[1].reshape(-1, shape.kv_heads, shape.dim).transpose(0, 1).contiguous()
        return made[0], values, scales[0], scales[1]


def turns(shape: Shape, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of Llama's angles, bfloat16 [positions, D / 2]."""
    half = shape.dim // 2
    speed = 500000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(positions, device=device)[:, None] * speed
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def timed(function: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call: of a captured graph's replays on a GPU, of one call on a CPU."""
    import time

    function()
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return sorted(times)[len(times) // 2]
