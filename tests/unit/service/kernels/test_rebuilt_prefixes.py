"""Many sequences on one prefix attend to all of it, whose keys and values are kept rebuilt."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import kernel_samples as samples
import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import kernel_choice
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.rebuilt_prefix import RebuiltPrefix, rebuilt_bytes
from xkv_service.decoding.select import Selection
from xkv_service.engine import graph_runner, rebuilt_prefixes
from xkv_service.engine.graph_runner import GraphRunner
from xkv_service.engine.rebuilt_prefixes import RebuiltPrefixes
from xkv_service.engine.runners import PackedRunner, Work
from xkv_service.factors import PrefixFactors
from xkv_service.kernels import shared_attention
from xkv_service.kernels.decode_plainly import parts_plainly
from xkv_service.kernels.shared_attention import SharedAttention
from xkv_service.sessions.context import Context

EXACT = 1e-4
"""Relative error of logits of two layers in float32."""
CHOOSING = SelectionSpec(budget=40, recent=8)
DENSE = SelectionSpec(selector="dense")
PLENTY = 2**30


@pytest.fixture(scope="module")
def model(device: torch.device) -> PreTrainedModel:
    return tiny_model("llama", head_dim=32, num_hidden_layers=2).to(device)


@pytest.fixture(scope="module")
def prefixes(model: PreTrainedModel) -> list[PrefixFactors]:
    """Two of one layout."""
    return [
        compress(
            model,
            random_ids(size, seed=size),
            CompressionSpec(rank_k=24, rank_v=40, group_size=2, factor_dtype="int8"),
        )
        for size in (120, 100)
    ]


@pytest.fixture(autouse=True)
def kernels(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel_choice, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(rebuilt_prefixes, "MANY", 3)
    monkeypatch.setattr(rebuilt_prefixes, "_FEW", 2)
    monkeypatch.setattr(graph_runner, "_ASKED", 99)
    with torch.no_grad(), enable_xkv(model):
        yield


def context(model: PreTrainedModel, factors: PrefixFactors, tokens: int) -> Context:
    cache = XKVCache.from_factors(model, factors, CHOOSING, tokens=tokens)
    return Context(model, cache, factors.token_ids[:tokens].tolist())


class Sequences:
    """Sequences by the runner, each step held against PyTorch behind the very same tail.

    Args:
        owners: number of the prefix, and tokens of it, of each sequence.
    """

    def __init__(
        self, model: PreTrainedModel, factors: list[PrefixFactors], owners: list[tuple[int, int]]
    ) -> None:
        self.runner, self._step = GraphRunner(model, PLENTY), 0
        self.contexts = [context(model, factors[number], tokens) for number, tokens in owners]
        self.step(range(len(owners)), count=3)

    def step(self, places: Iterable[int], count: int = 1) -> list[str]:
        """What each sequence attended to: "all" tokens, "chosen" ones, or "neither"."""
        self._step += 1
        work = [
            (self.contexts[place], random_ids(count, seed=100 * self._step + place).tolist())
            for place in places
        ]
        for one, _ in work[self._step % 2 :: 2]:  # the others go on as they are
            self.runner.settle(one)
        references = [self._references(one, ids) for one, ids in work]
        found = self.runner.run(work)
        return [self._nearest(mine, *both) for mine, both in zip(found, references, strict=True)]

    def _references(self, one: Context, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rider = self.runner._riders.get(id(one))
        both = []
        for spec in (DENSE, CHOOSING):
            other = one.fork()
            other.ids = one.ids[:]
            for layer in other.cache.layers:
                if rider is not None:
                    room = one.cache.layers[layer.index]._room
                    layer.keys, layer.values = (
                        states[:, :, : rider.count].clone() for states in (room.keys, room.values)
                    )
                reuses = layer.selection.reuses and spec is CHOOSING
                layer.selection = Selection(layer.selection.prefix, spec, reuses=reuses)
            both.append(plainly(other, ids))
        return both[0], both[1]

    @staticmethod
    def _nearest(found: torch.Tensor, dense: torch.Tensor, choosing: torch.Tensor) -> str:
        if samples.relative(found, dense) < EXACT:
            return "all"
        near = samples.relative(found, choosing)  # a few tokens may be others, of nearly the same share
        return "chosen" if near < min(0.3, samples.relative(found, dense)) else "neither"


def plainly(one: Context, ids: list[int]) -> torch.Tensor:
    before, kernel_choice.DEVICES = kernel_choice.DEVICES, ()
    try:
        return one.advance(ids)
    finally:
        kernel_choice.DEVICES = before


def test_a_rebuilt_prefix_has_the_keys_and_values_of_its_factors(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkv_service.decoding.rebuilt_prefix._CHUNK", 50)
    prefix = Prefix.of(model, prefixes[0])
    made = RebuiltPrefix(prefix)
    while not made.complete:
        made.rebuild_next(prefix)
    every = torch.arange(prefix.tokens, device=model.device)
    for index, states in made.layers.items():
        layer = prefix.layers[index]
        keys, values = layer.keys(every), layer.value_factors(every) @ layer.value_bases
        assert len(layer.exact_positions)
        keys[layer.exact_positions], values[:, layer.exact_positions] = (
            layer.exact_keys,
            layer.exact_values.transpose(0, 1),
        )
        assert samples.relative(states.keys.transpose(0, 1), keys) < 1e-6
        assert samples.relative(states.values, values) < 1e-6
    assert RebuiltPrefix(prefix).number != made.number
    assert rebuilt_bytes(prefix) == sum(
        states.keys.nbytes + states.values.nbytes for states in made.layers.values()
    )


def take_for_cudnn(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Any]) -> None:
    """In cuDNN's place, of any document with more than two sessions, from the first step on."""
    monkeypatch.setattr(graph_runner, "cudnn_runs", lambda _: True)
    monkeypatch.setattr(graph_runner, "SETTLED", 0)
    monkeypatch.setattr(shared_attention, "_ROWS", (4,))
    monkeypatch.setattr(shared_attention, "attend_by_parts", attend)
    monkeypatch.setattr(shared_attention, "cudnn_tokens", lambda _, tokens, __: tokens // 64 * 64)


def fixed_in(sequences: Sequences) -> set[shared_attention.Fixed]:
    """What the runner's graphs leave to cuDNN."""
    return {one for name in sequences.runner._graphs if name[-2] for one in name[-2][0].fixed}


@pytest.mark.parametrize("library", [False, True])
def test_many_sequences_attend_to_all_of_their_prefix(
    library: bool, model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that chooses, and on beginnings of different lengths; with few of them tokens are chosen.

    By kernels alone, and with a library that reads most of each document.
    """
    if library:
        take_for_cudnn(monkeypatch, parts_plainly)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3 + [(1, 100)] + [(0, 111)] * 3)
    rebuilt, mixed = sequences.runner._rebuilt, ["all"] * 3 + ["chosen"] + ["all"] * 3
    for _ in range(2):  # there are many, and the first of two layers
        assert sequences.step(range(7)) == ["chosen"] * 7
    for _ in range(3):
        assert sequences.step(range(7)) == mixed
    first = sequences.contexts[0].cache
    assert len(rebuilt._kept) == 1 and sequences.runner.shared_bytes == rebuilt_bytes(first.prefix.whole)
    assert sequences.step([0, 1, 4, 5]) == ["all"] * 4
    assert sequences.step([0, 2]) == ["all"] * 2
    assert sequences.step([6, 5, 4, 0, 3, 1]) == ["all"] * 4 + ["chosen", "all"]
    sequences.runner.settle(sequences.contexts[0])
    assert first.rebuilt_tokens == 0
    assert sequences.step([0, 3]) == ["chosen"] * 2
    assert sequences.step([0, 1]) == ["chosen"] * 2
    assert sequences.step([0, 1, 2]) == ["all"] * 3
    fixed = {(one.tokens, one.by_cudnn) for one in fixed_in(sequences)}
    assert fixed == ({(120, 64), (111, 64)} if library else set())


def test_documents_that_come_and_go_have_no_graphs_of_their_own(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the third step of the same document its graph is of any; gone ones leave no graph behind."""
    take_for_cudnn(monkeypatch, parts_plainly)
    monkeypatch.setattr(graph_runner, "SETTLED", 2)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3 + [(1, 100)])
    found = []
    for _ in range(6):
        sequences.step(range(3))
        found.append(len(fixed_in(sequences)))
    assert found == [0, 0, 0, 0, 1, 1]
    number = next(iter(fixed_in(sequences))).document
    runner = sequences.runner
    runner._rebuilt._kept.clear()
    for _ in range(6):
        sequences.step(range(3))
    assert [one.document for one in fixed_in(sequences)] == [max(runner._rebuilt.numbers)] != [number]


def test_a_library_that_fails_leaves_all_to_the_kernel(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    take_for_cudnn(monkeypatch, broken)
    monkeypatch.setattr(rebuilt_prefixes, "_PAUSE", 2)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3)
    attended = [sequences.step(range(3))[0] for _ in range(8)]
    assert attended[:3] == ["chosen"] * 3 and attended[-1] == "all" and not sequences.runner._broken
    assert "with cuDNN failed" in caplog.text and not fixed_in(sequences)


def test_a_library_is_not_blamed_for_a_step_that_it_took_no_part_in(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    take_for_cudnn(monkeypatch, parts_plainly)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3 + [(1, 100)])
    for _ in range(4):
        sequences.step(range(3))
    assert fixed_in(sequences)
    with monkeypatch.context() as broken:
        broken.setattr(graph_runner.StepGraph, "bind", raise_error)
        assert sequences.step([3]) == ["chosen"]
    assert "a decode step failed" in caplog.text
    assert "cuDNN" not in caplog.text and sequences.runner._cudnn


def raise_error(*_: object) -> None:
    raise RuntimeError("an error of the device")


def test_the_budget_is_kept(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix that has not been used for a while makes room, also where a sequence decodes from it."""
    monkeypatch.setattr(rebuilt_prefixes, "_IDLE", 5)
    one, other = (Prefix.of(model, factors) for factors in prefixes)
    kept = RebuiltPrefixes(rebuilt_bytes(one))
    for _ in range(4):
        kept.heed([one] * 3 + [other] * 2)
    assert kept.of(one) is not None and kept.nbytes == rebuilt_bytes(one)
    for _ in range(5):
        kept.heed([one] + [other] * 3)
    assert kept.of(other) is None and kept.of(one) is None and kept.nbytes == rebuilt_bytes(one)
    for _ in range(4):
        kept.heed([one] + [other] * 3)
    assert kept.of(other) is not None and kept.nbytes == rebuilt_bytes(other)
    small = RebuiltPrefixes(rebuilt_bytes(one) - 1)
    for _ in range(4):
        small.heed([one] * 3)
    assert small.of(one) is None and not small.nbytes


def test_sequences_on_other_beginnings_are_not_many(
    model: PreTrainedModel, prefixes: list[PrefixFactors]
) -> None:
    """Each beginning is read by itself."""
    kept, whole = RebuiltPrefixes(PLENTY), Prefix.of(model, prefixes[0])
    beginnings = [whole.first(tokens) for tokens in (100, 110, 119)]
    for _ in range(4):
        kept.heed(beginnings)
    assert not kept.nbytes
    for _ in range(4):
        kept.heed([*beginnings, beginnings[0], beginnings[0]])
    assert kept.of(beginnings[0]) is not None and kept.of(beginnings[1]) is None and kept.of(whole) is None


def test_a_rebuilt_prefix_goes_with_its_prefix(model: PreTrainedModel, prefixes: list[PrefixFactors]) -> None:
    kept, prefix = RebuiltPrefixes(PLENTY), replace(Prefix.of(model, prefixes[0]))
    for _ in range(4):
        kept.heed([prefix] * 3)
    made, keys = weakref.ref(kept.of(prefix)), kept.nbytes
    assert keys and made() is not None
    del prefix
    gc.collect()
    kept.heed([])
    assert made() is None and not kept.nbytes


@pytest.mark.parametrize("kind", ["landmark", "reuse"])
def test_other_ways_to_choose_beside_it(kind: str, model: PreTrainedModel) -> None:
    """Landmarks, and a layer that takes the choice of the one before it."""
    more: dict[str, Any] = {"index": "landmark"} if kind == "landmark" else {"reuse": (1,)}
    factors = [
        compress(
            model, random_ids(size, seed=size), CompressionSpec(rank_k=24, rank_v=40, group_size=2, **more)
        )
        for size in (120, 100)
    ]
    sequences = Sequences(model, factors, [(0, 120)] * 3 + [(1, 100)])
    for _ in range(2):
        assert sequences.step(range(4)) == ["chosen"] * 4
    for _ in range(2):
        assert sequences.step(range(4)) == ["all"] * 3 + ["chosen"]


def test_nothing_is_rebuilt_without_a_budget(model: PreTrainedModel, prefixes: list[PrefixFactors]) -> None:
    prefix, kept = Prefix.of(model, prefixes[0]), RebuiltPrefixes(0)
    for _ in range(4):
        kept.heed([prefix] * 9)
    assert kept.of(prefix) is None and not kept.nbytes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_without_memory_tokens_are_chosen(
    error: type[Exception], model: PreTrainedModel, prefixes: list[PrefixFactors],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise error("CUDA error: out of memory")

    monkeypatch.setattr(rebuilt_prefixes, "_PAUSE", 3)
    prefix, kept = Prefix.of(model, prefixes[0]), RebuiltPrefixes(PLENTY)
    with monkeypatch.context() as patched:
        patched.setattr(RebuiltPrefix, "rebuild_next", full)
        for _ in range(3):
            kept.heed([prefix] * 3)
    assert not kept.nbytes and "no memory" in caplog.text
    for _ in range(8):
        kept.heed([prefix] * 3)
    assert kept.of(prefix) is not None


def test_graphs_that_have_no_memory_take_rebuilt_prefixes_with_them(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are not rebuilt at once, to fail again."""
    monkeypatch.setattr(rebuilt_prefixes, "_PAUSE", 4)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3)
    for attended in ("chosen", "chosen", "all"):
        assert sequences.step(range(3)) == [attended] * 3
    assert sequences.runner.shared_bytes
    real, failed = graph_runner.StepGraph.run, []

    def full(graph: graph_runner.StepGraph, ids: list[int]) -> torch.Tensor:
        if not failed:
            failed.append(ids)
            raise torch.OutOfMemoryError
        return real(graph, ids)

    monkeypatch.setattr(graph_runner.StepGraph, "run", full)
    for _ in range(5):
        assert sequences.step(range(3)) == ["chosen"] * 3
    assert not sequences.runner._pause
    for _ in range(3):
        attended = sequences.step(range(3))
    assert attended == ["all"] * 3


def test_a_forward_that_has_no_memory_runs_without_rebuilt_prefixes(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = Sequences(model, prefixes, [(0, 120)] * 4)
    for _ in range(3):
        sequences.step(range(3))
    real, failed = PackedRunner.run, []

    def full(runner: PackedRunner, work: Work) -> torch.Tensor:
        if not failed:
            failed.append(work)
            raise torch.OutOfMemoryError
        return real(runner, work)

    monkeypatch.setattr(PackedRunner, "run", full)
    assert sequences.runner.shared_bytes
    assert sequences.step([3], count=4) == ["chosen"] and failed
    assert not sequences.runner.shared_bytes and not sequences.runner._broken


def test_a_shared_kernel_that_does_not_run_leaves_graphs_as_they_were(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(SharedAttention, "__call__", broken)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3)
    for _ in range(5):
        assert sequences.step(range(3)) == ["chosen"] * 3
    assert not sequences.runner._broken and sequences.runner._graphs and not sequences.runner.shared_bytes


def test_a_prefix_that_cannot_be_rebuilt_ends_no_sequence(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(RebuiltPrefix, "rebuild_next", lambda *_: 1 / 0)
    sequences = Sequences(model, prefixes, [(0, 120)] * 3)
    for _ in range(4):
        assert sequences.step(range(3)) == ["chosen"] * 3
    assert "none is from now on" in caplog.text and not sequences.runner.shared_bytes
