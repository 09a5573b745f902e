"""A whole decode step of a Llama-3.1-8B-shaped model: full cache or factors, each at its largest batch.

python benchmarks/gpu/decode_step.py --tokens 128 --sides full,8x --out OUT/decode_step_128.json
python benchmarks/gpu/decode_step.py --tokens 8,32,64,128 --sides full,8x --out OUT/decode_step_lengths.json
python benchmarks/gpu/decode_step.py --sides cascade,8x --documents one --batches 8,128 --out OUT/one.json
TRITON_INTERPRET=1 python benchmarks/gpu/decode_step.py --smoke --out smoke.json     # small, on a CPU

Transformers' own modules with random weights, embedding to sampling, the new token's keys and values
appended, in one CUDA graph; attention is all that differs. Full: the faster of cuDNN's and FlashAttention's
decode over a contiguous cache. Factors ("8x" and "20x" as `compress` makes them): the decode kernels. Every
sequence has a document of its own unless `--documents one`, which "cascade" and "rebuilt" read once for all;
of several lengths, as many of each, the whole caches of each length are attended to by a call of their own.
Tails grow with every step that is timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import cascade
import synthetic
from compression import LLAMA_8B
from report import Report, command

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.decode_attention import DecodeAttention, Tiles
from xkv_service.kernels.document_table import DocumentTable
from xkv_service.kernels.shared_attention import Document, Shape, SharedAttention, SharedGroups
from xkv_service.kernels.tail_attention import tail_attention
from xkv_service.kernels.tail_table import TailTable

_NAME = "decode_step"
_TAIL, _CAPACITY = 128, 512
"""Tokens in every tail at the start, and most of them."""
_RESERVED = 6 * 2**30
"""Bytes left for activations, partial sums and the allocator."""
_SMOKE = {
    **LLAMA_8B, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


class Side(Protocol):
    """Attention of every layer over what one kind of cache holds.

    Attributes:
        nbytes: of what sequences hold, tails included.
    """

    nbytes: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Append the new token at `lengths` and attend: [batch, 1, query_heads, D].

        Args:
            query, key, value: [batch, heads, 1, D]. lengths: int32 [batch], tokens in the tails before.
        """


class Tails:
    """Keys and values [layers][batch, kv_heads, room, D]; the place of a new token is on the device."""

    def __init__(self, shape: synthetic.Shape, batch: int, room: int, device: torch.device) -> None:
        size = (batch, shape.kv_heads, room, shape.dim)
        self.keys, self.values = (
            [torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(shape.layers)]
            for _ in range(2)
        )
        self.nbytes = sum(one.nbytes for one in (*self.keys, *self.values))

    def tables(self) -> list[TailTable]:
        """As the kernels find them, by layer."""
        return [TailTable.of_rooms(*one) for one in zip(self.keys, self.values, strict=True)]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor) -> None:
        """Write [batch, kv_heads, 1, D] at int places [batch]."""
        index = places.long()[:, None, None, None].expand(-1, key.shape[1], 1, key.shape[3])
        self.keys[layer].scatter_(2, index, key)
        self.values[layer].scatter_(2, index, value)


class Full:
    """The whole cache, one contiguous tensor a layer and length of documents.

    A new token overwrites the last one read, so that every step reads as many.
    """

    def __init__(self, shape: synthetic.Shape, tokens: list[int], device: torch.device) -> None:
        counts = Counter(tokens)
        self._counts = list(counts.values())
        self._tails = [Tails(shape, count, size + _TAIL, device) for size, count in counts.items()]
        self._last = [torch.full((count,), size + _TAIL - 1, device=device) for size, count in counts.items()]
        self.nbytes = sum(tails.nbytes for tails in self._tails)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """As `Side`."""
        parts = zip(*(states.split(self._counts) for states in (query, key, value)), strict=True)
        found = []
        for (asked, new_key, new_value), tails, last in zip(parts, self._tails, self._last, strict=True):
            tails.append(layer, new_key, new_value, last)
            keys, values = tails.keys[layer], tails.values[layer]
            found.append(scaled_dot_product_attention(asked, keys, values, enable_gqa=True))
        return (found[0] if len(found) == 1 else torch.cat(found)).transpose(1, 2)


class Cascade:
    """One document's whole cache, read once for all sequences, and a tail of each, merged by their log-sums.

    Queries of all sequences are rows of one attention over the document, by FlashAttention or by cuDNN.
    """

    def __init__(
        self, shape: synthetic.Shape, batch: int, tokens: int, device: torch.device, parts: int = 0
    ) -> None:
        self._document, self._tails = Tails(shape, 1, tokens, device), Tails(shape, batch, _CAPACITY, device)
        self._rooms, self._scaling, self._parts = self._tails.tables(), shape.dim**-0.5, parts
        self._rest = torch.empty(batch, shape.query_heads, shape.dim, device=device)
        self._rest_log = torch.empty(batch, shape.query_heads, device=device)
        self.nbytes = self._document.nbytes + self._tails.nbytes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """As `Side`."""
        self._tails.append(layer, key, value, lengths)
        keys, values = self._document.keys[layer], self._document.values[layer]
        asked = query[:, :, 0].contiguous()
        tail_attention(asked, self._rooms[layer], lengths + 1, self._rest, self._rest_log, self._scaling)
        found, log = cascade.over_document(cascade.rows_of(asked, keys.shape[1]), keys, values, self._parts)
        return cascade.merged(found, log, self._rest, self._rest_log).to(query.dtype)[:, None]


class Rebuilt:
    """As `Cascade`, by the kernel that the engine runs where a prefix's keys and values are kept rebuilt."""

    def __init__(self, shape: synthetic.Shape, batch: int, tokens: int, device: torch.device) -> None:
        document, self._tails = Tails(shape, 1, tokens, device), Tails(shape, batch, _CAPACITY, device)
        self._rooms, self._scaling = self._tails.tables(), shape.dim**-0.5
        self._rest = torch.empty(batch, shape.query_heads, shape.dim, device=device)
        self._rest_log = torch.empty(batch, shape.query_heads, device=device)
        layers = zip(document.keys, document.values, strict=True)
        states = {layer: States(keys[0], values[0]) for layer, (keys, values) in enumerate(layers)}
        whole = Document(0, states, tokens)
        groups = Shape.of([(whole, batch)], shape.query_heads // shape.kv_heads)
        self._groups = SharedGroups(groups, device)
        self._groups.overwrite([(whole, range(batch))])
        heads = shape.kv_heads, shape.query_heads // shape.kv_heads, shape.dim, shape.dim
        self._attention = SharedAttention(groups, *heads, torch.bfloat16, device)
        self.nbytes = document.nbytes + self._tails.nbytes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """As `Side`."""
        self._tails.append(layer, key, value, lengths)
        asked = query[:, :, 0].contiguous()
        tail_attention(asked, self._rooms[layer], lengths + 1, self._rest, self._rest_log, self._scaling)
        self._attention(asked, self._groups, layer, self._rest, self._rest_log, self._scaling)
        return self._rest.to(query.dtype)[:, None]


class Factors:
    """Factors and the exact tail, by the decode kernels.

    Args:
        name: of a kind of factors. tokens: of each session's document, equal ones side by side.
        repeats: of how many layers each one that chooses is the first; the others attend to what it chose.
    """

    def __init__(
        self, shape: synthetic.Shape, name: str, tokens: list[int], budget: int, device: torch.device, *,
        one: bool, repeats: int, tiles: Tiles,
    ) -> None:  # fmt: skip
        batch = len(tokens)
        made = [
            synthetic.Documents(
                shape, synthetic.kind_of(name, shape, size), size, 1 if one else count, device
            )
            for size, count in Counter(tokens).items()
        ]
        by_layer = [list(chain(*layers)) for layers in zip(*(one.by_layer for one in made), strict=True)]
        self._tables = [
            DocumentTable(layer * batch if one else layer, [budget] * batch) for layer in by_layer
        ]
        longest = max(tokens)
        most = min(longest, budget + synthetic.RECENT)
        self._attention = DecodeAttention(
            self._tables[0], shape.query_heads, shape.dim, shape.dim, longest, most,
            synthetic.turns(shape, longest, device), shape.dim**-0.5, tiles=tiles,
        )  # fmt: skip
        self._tails = Tails(shape, batch, _CAPACITY, device)
        self._rooms, self._repeats = self._tails.tables(), repeats
        self.nbytes = sum(documents.nbytes for documents in made) + self._tails.nbytes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """As `Side`."""
        self._tails.append(layer, key, value, lengths)
        asked = query[:, :, 0].contiguous()
        out = torch.empty_like(asked)
        repeat = layer % self._repeats > 0
        self._attention(asked, self._rooms[layer], lengths + 1, self._tables[layer], out, repeat=repeat)
        return out[:, None]

    @property
    def rebuilt(self) -> int:
        """Tokens of all lists in the layer that ran last."""
        return int(self._attention.chosen.counts.sum())


class Nothing:
    """No attention at all: what the rest of a step takes."""

    nbytes = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The query as it is."""
        return query.transpose(1, 2)


class Step:
    """A step of a whole model: reads ids on the device, writes the next ones there."""

    def __init__(self, model: LlamaForCausalLM, side: Side, tokens: list[int]) -> None:
        self.model, self.side, device = model, side, model.device
        self.ids = torch.randint(3, model.config.vocab_size, (len(tokens), 1), device=device)
        self.lengths = torch.full((len(tokens),), _TAIL, dtype=torch.int32, device=device)
        self._tokens = torch.tensor(tokens, device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        """One token for every sequence, drawn at temperature 1."""
        _CURRENT.append(self)
        positions = (self._tokens + self.lengths.long())[:, None]
        out: Any = self.model(input_ids=self.ids, position_ids=positions, use_cache=False)
        logits = out.logits[:, -1].float()
        noise = -torch.empty_like(logits).exponential_().log()
        self.ids.copy_((logits + noise).argmax(-1, keepdim=True))
        self.lengths += 1
        _CURRENT.pop()


_CURRENT: list[Step] = []


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    step = _CURRENT[-1]
    return step.side.attend(module.layer_idx, query, key, value, step.lengths), None


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = synthetic.SMOKE if arguments.smoke else synthetic.LLAMA_8B
    model = _model(_SMOKE if arguments.smoke else LLAMA_8B, device)
    if arguments.join:
        _join(model)
    if arguments.compile:
        _compile(model)
    report = Report("decode_step", command(), "the same step over the whole cache, at its largest batch")
    sizes = [160, 96] if arguments.smoke else [1024 * int(one) for one in arguments.tokens.split(",")]
    sizes = sizes[:1] if arguments.documents == "one" else sizes
    started, profiles = time.monotonic(), dict[str, dict[str, float]]()
    for name in arguments.sides.split(","):
        for batch in _batches(arguments, name, shape, sizes, device):
            if time.monotonic() - started > arguments.seconds:
                print(f"stopped after {arguments.seconds} s", flush=True)
                break
            row = _measure(arguments, name, model, shape, sizes, batch, device)
            while row is None and batch > len(sizes) and not arguments.batches:  # estimated a little too high
                batch = batch * 15 // 16
                row = _measure(arguments, name, model, shape, sizes, batch, device)
            if row is not None:
                profiles[f"{name}, {row['batch']} sessions"] = row.pop("kernels_us", {})
                report.add(**row)
    _compare(report)
    report.write(
        arguments.out, model="Llama-3.1-8B shapes, random weights and factors", tail=_TAIL,
        weight_bytes=_bytes_read(model), kernels_us=profiles,
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokens", default="128", help="thousands of tokens of a document; several: as many of each"
    )
    parser.add_argument(
        "--sides",
        default="full,bf16,8x,20x,mixed20",
        help=f"full, {', '.join(cascade.PARTS)}, rebuilt, bf16, 8x, 20x, mixed20, nothing",
    )
    parser.add_argument("--batches", default="", help="comma-separated; default 1 and the largest that fits")
    parser.add_argument(
        "--documents", choices=("own", "one"), default="own", help="one: all share a document"
    )
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a session chooses in a layer")
    parser.add_argument("--repeats", type=int, default=1, help="layers that attend to one choice")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile norms and MLPs")
    parser.add_argument("--join", action="store_true", help="one product for queries, keys and values")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after so long")
    parser.add_argument("--profile", action="store_true", help="also a step's time by kernel")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks this script")
    return parser.parse_args()


def _model(fields: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    config = LlamaConfig(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.config._attn_implementation = _NAME
    return model


def _bytes_read(model: LlamaForCausalLM) -> int:
    """Of weights that a step reads: of the embedding it reads no more than a row a token."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    embedding = 0 if tied else model.model.embed_tokens.weight.nbytes
    return sum(one.nbytes for one in model.parameters()) - embedding


def _compile(model: LlamaForCausalLM) -> None:
    torch._dynamo.config.recompile_limit = 64  # each batch size is compiled for itself
    cascade.merged = torch.compile(cascade.merged, dynamic=False)
    for layer in model.model.layers:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, torch.compile(getattr(layer, name)))


def _join(model: LlamaForCausalLM) -> None:
    """Products of one input become one, over a copy of the modules' weights; RoPE is compiled."""
    for layer in model.model.layers:
        for module, names in ((layer.self_attn, "qkv"), (layer.mlp, ("gate", "up"))):
            joined = Joined([getattr(module, f"{name}_proj") for name in names])
            for place, name in enumerate(names):
                setattr(module, f"{name}_proj", Part(joined, place) if place else joined)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # of the separate weights, so that it counts as free
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb)
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "rotary_fn"):
            layer.self_attn.rotary_fn = modeling_llama.apply_rotary_pos_emb


class Joined(torch.nn.Module):
    """The first of several linear modules of one input: it has one product for all of them."""

    def __init__(self, modules: list[torch.nn.Linear]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.cat([one.weight.data for one in modules]), requires_grad=False)
        self.sizes = [one.out_features for one in modules]
        self.parts: tuple[torch.Tensor, ...] = ()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Its own part; the others wait for theirs."""
        self.parts = torch.nn.functional.linear(states, self.weight).split(self.sizes, -1)
        return self.parts[0]


class Part(torch.nn.Module):
    """Another of them."""

    def __init__(self, joined: Joined, place: int) -> None:
        super().__init__()
        self._joined, self._place = [joined], place

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Its part of the product that was made for the first."""
        return self._joined[0].parts[self._place]


def _batches(
    arguments: argparse.Namespace, name: str, shape: synthetic.Shape, sizes: list[int], device: torch.device
) -> list[int]:
    """The sizes asked for, else 1 and the largest that fits beside the model."""
    if arguments.smoke:
        return [2, 4]
    if arguments.batches:
        return [int(one) for one in arguments.batches.split(",")]
    free, _ = torch.cuda.mem_get_info(device)
    most = 256
    if name != "nothing" and arguments.documents == "own":
        each = [_sequence_bytes(name, shape, size) for size in sizes]
        room, most = free - _RESERVED - max(common for _, common in each), 0
        while (held := each[most % len(sizes)][0]) <= room:
            room, most = room - held, most + 1
    return sorted({len(sizes), most}) if most > len(sizes) else [len(sizes)]


def _sequence_bytes(name: str, shape: synthetic.Shape, tokens: int) -> tuple[int, int]:
    """Bytes a sequence holds, and bytes that all of them share; measured on a short document."""
    tails = shape.layers * shape.full_bytes * _CAPACITY
    if name == "full":
        return shape.layers * shape.full_bytes * (tokens + _TAIL), 0
    kind, short = synthetic.kind_of(name, shape, tokens), 256
    made = [synthetic.Documents(shape, kind, short, count, torch.device("cpu")).nbytes for count in (1, 2)]
    constant = made[0] - (made[1] - made[0])
    rows = synthetic.Documents(shape, kind, 2 * short, 1, torch.device("cpu")).nbytes - made[0]
    own = made[1] - made[0] - rows
    # Scores, marks, shares and partial sums of a batch grow with it too: 64 bytes a token are plenty.
    return own + rows * tokens // short + tails + 64 * tokens, max(0, constant)


def _measure(
    arguments: argparse.Namespace, name: str, model: LlamaForCausalLM, shape: synthetic.Shape,
    sizes: list[int], batch: int, device: torch.device,
) -> dict[str, Any] | None:  # fmt: skip
    """One row, or None where memory does not suffice."""
    tokens = sorted(sizes[number % len(sizes)] for number in range(batch))
    row: dict[str, Any] = {"side": name, "tokens": sizes[0] if len(sizes) == 1 else "/".join(map(str, sizes))}
    row |= {"batch": batch, "documents": arguments.documents}
    if name not in ("full", *cascade.PARTS, "rebuilt", "nothing"):
        row |= {"repeats": arguments.repeats}
    side: Any = None
    step: Any = None
    try:
        side = _side(arguments, name, shape, tokens, device)
        step = Step(model, side, tokens)
        backend = _backend(name, step, device)
        with sdpa_kernel(backend):
            took = _timed_steps(step, 2 if arguments.smoke else arguments.steps, device)
        rest = _timed_steps(Step(model, Nothing(), tokens), 2 if arguments.smoke else 10, device)
        row |= {
            "ms": 1000 * took, "tokens/s": batch / took, "outside_attention_ms": 1000 * rest,
            "attention_us_a_layer": 1e6 * (took - rest) / shape.layers,
            "GiB_held": side.nbytes / 2**30, "rebuilt": side.rebuilt if isinstance(side, Factors) else 0,
            "backend": {"full": backend.name, "cascade": "FLASH_ATTENTION"}.get(
                name, "CUDNN_ATTENTION" if name in cascade.PARTS else "kernels"
            ),
        }  # fmt: skip
        if arguments.profile:
            row["kernels_us"] = _profiled(step, device)
    except torch.OutOfMemoryError:
        print(f"out of memory: {row}", flush=True)
        return None
    finally:
        del side, step  # which holds the side too
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def _side(
    arguments: argparse.Namespace, name: str, shape: synthetic.Shape, tokens: list[int], device: torch.device
) -> Side:
    if name == "nothing":
        return Nothing()
    if name == "full":
        return Full(shape, tokens, device)
    if name in cascade.PARTS:
        return Cascade(shape, len(tokens), tokens[0], device, cascade.PARTS[name])
    if name == "rebuilt":
        return Rebuilt(shape, len(tokens), tokens[0], device)
    return Factors(
        shape, name, tokens, 24 if arguments.smoke else arguments.budget, device,
        one=arguments.documents == "one", repeats=arguments.repeats, tiles=Tiles(),
    )  # fmt: skip


def _backend(name: str, step: Step, device: torch.device) -> SDPBackend:
    """The faster of the backends for attention over the whole cache, by three steps each."""
    if name != "full" or device.type != "cuda":
        return SDPBackend.MATH
    times: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                times[backend] = _timed_steps(step, 3, device)
        except RuntimeError as error:
            print(f"{backend}: {error}", flush=True)
    return min(times, key=lambda backend: times[backend])


def _timed_steps(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Median seconds of a step: of a captured graph's replays on a GPU."""
    assert count + 8 < _CAPACITY - _TAIL, "the tails would run over"
    if device.type != "cuda":
        step()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(count):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return sorted(times)[len(times) // 2]


def _profiled(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Microseconds of a step by kernel: those that take most, and all others together."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    times = {one.key: float(one.self_device_time_total) for one in profile.key_averages()}
    most = sorted(times, key=lambda name: -times[name])[:14]
    found = {f"{name[:80]} x{one}": times[name] for name in most for one in [_calls(profile, name)]}
    print("\n".join(f"{took:10.0f} us  {name}" for name, took in found.items()), flush=True)
    return found | {"others": sum(times.values()) - sum(found.values())}


def _calls(profile: Any, name: str) -> int:
    return next(int(one.count) for one in profile.key_averages() if one.key == name)


def _compare(report: Report) -> None:
    """Throughput of every row over the full cache's best; of one document over the best cascade."""
    best = max((row["tokens/s"] for row in report.rows if row["side"] == "full"), default=None)
    cascades = dict[int, float]()
    for row in report.rows:
        if row["side"] in cascade.PARTS:
            cascades[row["batch"]] = max(row["tokens/s"], cascades.get(row["batch"], 0.0))
    for row in report.rows:
        against = cascades.get(row["batch"], best)
        if against is not None:
            row["times_full"] = row["tokens/s"] / against


if __name__ == "__main__":
    main()
