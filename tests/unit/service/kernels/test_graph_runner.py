"""Steps as CUDA graphs are those of an ordinary forward; on a CPU the same forward runs uncaptured."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import kernel_samples as samples
import pytest
import torch
from compressed import random_ids
from families import tiny_model
from launch_checks import EXACT, check
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import kernel_choice
from xkv_service.decoding.attention_call import AttentionCall
from xkv_service.decoding.kernel_choice import why_not
from xkv_service.decoding.kernel_step import layout_of
from xkv_service.decoding.scoring import Scoring
from xkv_service.engine import graph_runner, packed_cache, step_graph
from xkv_service.engine.graph_runner import GraphRunner
from xkv_service.engine.runners import PackedRunner, SeparateRunner, Work, make_runner
from xkv_service.factors import PrefixFactors
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import empty_context

TOLERANCE = 0.1
"""Relative error of logits: choices differ where shares of two tokens are less than a bin apart. So what each
sequence attends to in a graph is held against PyTorch's attention to the same tokens besides (`watched`).
"""


@pytest.fixture(scope="module")
def model(device: torch.device) -> PreTrainedModel:
    return tiny_model("llama", head_dim=32, num_hidden_layers=2).to(device)


@pytest.fixture(scope="module")
def prefixes(model: PreTrainedModel) -> list[PrefixFactors]:
    """Two that one graph runs for: their lengths and ranks are others."""
    ranks = {120: (24, 40), 100: (20, 33)}
    return [
        compress(
            model,
            random_ids(size, seed=size),
            CompressionSpec(rank_k=keys, rank_v=values, group_size=2, factor_dtype="int8"),
        )
        for size, (keys, values) in ranks.items()
    ]


@pytest.fixture(autouse=True)
def no_question_rides(monkeypatch: pytest.MonkeyPatch) -> None:
    """But in the tests of them."""
    monkeypatch.setattr(graph_runner, "_ASKED", 99)


@pytest.fixture(autouse=True)
def kernels(model: PreTrainedModel) -> Iterator[None]:
    before, kernel_choice.DEVICES = kernel_choice.DEVICES, ("cpu", "cuda")
    try:
        with torch.no_grad(), enable_xkv(model):
            yield
    finally:
        kernel_choice.DEVICES = before


def contexts(model: PreTrainedModel, prefixes: list[PrefixFactors]) -> dict[str, Context]:
    """Three sequences over two prefixes, and one without any."""
    found = {"exact": empty_context(model)}
    for name, number in (("a", 0), ("b", 1), ("c", 0)):
        cache = XKVCache.from_factors(model, prefixes[number], SelectionSpec(budget=60, recent=8))
        found[name] = Context(model, cache, prefixes[number].token_ids.tolist())
    return found


def plainly(work: list[tuple[Context, list[int]]]) -> torch.Tensor:
    before, kernel_choice.DEVICES = kernel_choice.DEVICES, ()
    try:
        return SeparateRunner().run(work)
    finally:
        kernel_choice.DEVICES = before


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """New tokens of each context, forward by forward that no graph runs."""
    found: list[list[int]] = []
    real = PackedRunner.run

    def run(runner: PackedRunner, work: Work) -> torch.Tensor:
        found.append([len(ids) for _, ids in work])
        return real(runner, work)

    monkeypatch.setattr(PackedRunner, "run", run)
    return found


class Watched:
    """Holds attention in graphs against PyTorch, but for what a GPU replays. Tails are read from the room
    that a sequence's own layer has.

    Attributes:
        chosen: positions, layer by layer and sequence by sequence.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[torch.Tensor] = []
        self._riders: list[step_graph.Rider] = []
        run, attend = step_graph.StepGraph.run, step_graph._GraphLayer.attend

        def run_and_note(graph: step_graph.StepGraph, ids: list[int]) -> torch.Tensor:
            self._riders = graph._riders
            assert len(self._riders) == len(ids)
            return run(graph, ids)

        def attend_and_check(layer: step_graph._GraphLayer, call: AttentionCall) -> torch.Tensor:
            out = attend(layer, call)
            if out.is_cuda and torch.cuda.is_current_stream_capturing():
                return out
            chosen = next(iter(layer._launch._kernels.values())).chosen
            for number, (rider, new) in enumerate(
                zip(self._riders, step_graph._slots_before(self._riders), strict=True)
            ):
                own = rider.cache.layers[layer.index]
                keys, values = (states[:, :, : rider.count + new + 1] for states in own.room)
                query, scaling = call.query[0, :, number], call.scoring.scaling
                try:
                    check(own.selection, (keys, values), query, scaling, chosen, number, out[0, number])
                except AssertionError as error:  # the runner would go on without graphs
                    pytest.fail(f"layer {layer.index}, sequence {number}: {error}")
                self.chosen.append(chosen.positions[number, : chosen.counts[number]].clone())
            return out

        monkeypatch.setattr(step_graph.StepGraph, "run", run_and_note)
        monkeypatch.setattr(step_graph._GraphLayer, "attend", attend_and_check)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


PLAN = [
    {"a": 3, "b": 2, "exact": 4}, {"a": 1, "b": 1, "exact": 1}, {"b": 1, "a": 1}, {"a": 1, "b": 1, "c": 5},
    {"c": 1, "a": 1, "b": 1}, {"c": 1, "b": 1}, {"b": 4, "c": 1}, {"b": 1},
]  # fmt: skip
"""New tokens of each sequence, step by step: they come, go, change places, and go on with several at once."""


@pytest.mark.parametrize("questions", [False, True])
def test_steps_are_those_of_each_sequence_alone(
    questions: bool, model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch,
    watched: Watched,
) -> None:  # fmt: skip
    """Single tokens, and questions from the first of a size on or never: tails begin in graphs then."""
    monkeypatch.setattr(graph_runner, "_ASKED", 1 if questions else 99)
    runs = []
    real = step_graph.StepGraph.run
    monkeypatch.setattr(step_graph.StepGraph, "run", lambda graph, ids: runs.append(ids) or real(graph, ids))
    runner = make_runner(model)
    assert isinstance(runner, GraphRunner)
    ours, theirs = contexts(model, prefixes), contexts(model, prefixes)
    for number, lengths in enumerate(PLAN):
        ids = {name: random_ids(count, seed=100 + number).tolist() for name, count in lengths.items()}
        before, attended = len(runs), len(watched.chosen)
        found = runner.run([(ours[name], one) for name, one in ids.items()])
        expected = plainly([(theirs[name], one) for name, one in ids.items()])
        assert samples.relative(found, expected) < TOLERANCE
        riding = [count for name, count in lengths.items() if name != "exact" and (count == 1 or questions)]
        graphed = sum(riding)
        assert list(map(len, runs[before:])) == [graphed] * (graphed > 0)
        assert len(watched.chosen) - attended == 2 * graphed or model.device.type == "cuda"
    for name, context in ours.items():
        runner.settle(context)
        assert context.ids == theirs[name].ids
        assert context.cache.get_seq_length() == len(context.ids)
        both = zip(context.cache.layers, theirs[name].cache.layers, strict=True)
        for tolerance, (mine, other) in zip(
            (EXACT, TOLERANCE), both, strict=True
        ):  # no choice before the first
            assert samples.relative(mine.keys, other.keys) < tolerance
            assert samples.relative(mine.values, other.values) < tolerance
    assert not runner._riders and all(not graph._riders for graph in runner._graphs.values())
    ours["a"].rewind(len(ours["a"].ids) - 1)
    theirs["a"].rewind(len(theirs["a"].ids) - 1)
    assert samples.relative(runner.run([(ours["a"], [7])]), plainly([(theirs["a"], [7])])) < TOLERANCE


def test_layouts_are_compared_when_a_cache_is_new(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have hundreds of numbers: a step compares none of them."""
    compared = []

    class Layout(tuple[object, ...]):
        def __hash__(self) -> int:
            compared.append(self)
            return super().__hash__()

    monkeypatch.setattr(graph_runner, "layout_of", lambda cache: Layout(layout_of(cache)))
    runner, ours = GraphRunner(model), contexts(model, prefixes)
    pair = [ours["a"], ours["b"]]
    for ids in ([3, 4], [5]):
        runner.run([(context, ids) for context in pair])
    compared.clear()
    runner.run([(context, [6]) for context in pair])
    assert not compared and len(runner._graphs) == 1


@pytest.mark.slow
def test_a_step_runs_what_was_compiled(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and rotary embedding, compiled when the runner is made: no step compiles anything."""
    found = []
    for on in (False, True):
        monkeypatch.setattr(kernel_choice, "COMPILES", on)
        runner, ours = GraphRunner(model), contexts(model, prefixes)
        runner.run([(ours["a"], [3]), (ours["b"], [4])])
        with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
            steps = [runner.run([(ours[name], [5]) for name in names]) for names in ("a", "ab")]
        assert runner._compiled.on is on and len(runner._graphs) == 2
        found.append(torch.cat(steps))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def fill(rider: step_graph.Rider) -> None:
    """As if so many steps had run that its room is full."""
    torch.manual_seed(0)
    new = rider._end - rider.count
    for index in rider.rows:
        room = rider.cache.layers[index]._room
        for states in (room.keys, room.values):
            states[:, :, rider.count : rider._end].normal_()
    rider.count += new
    rider.context.ids.extend([5] * new)


def test_a_tail_moves_when_its_room_is_full(
    model: PreTrainedModel, prefixes: list[PrefixFactors], watched: Watched
) -> None:
    """A fork that shares a tail keeps it, wherever the other one goes on."""
    runner = GraphRunner(model)
    context = contexts(model, prefixes)["a"]
    runner.run([(context, random_ids(3).tolist())])
    fork = context.fork()
    held = fork.cache.layers[0].keys.clone()
    runner.run([(context, [5])])
    rider = runner._riders[id(context)]
    room = rider._end
    fill(rider)
    runner.run([(context, [6])])
    assert rider._end > room and rider.count == room + 1
    runner.settle(context)
    assert context.cache.tail_tokens == room + 1
    assert torch.equal(fork.cache.layers[0].keys, held)
    assert torch.equal(context.cache.layers[0].keys[:, :, :3], held)


def test_a_graph_that_fails_is_no_loss(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = GraphRunner(model)
    ours, theirs = contexts(model, prefixes), contexts(model, prefixes)
    for ids in ([3, 4, 5], [6], [7], [8]):
        if ids == [7]:
            monkeypatch.setattr(step_graph.StepGraph, "run", lambda *_: 1 / 0)
        found = runner.run([(ours["a"], ids), (ours["b"], ids)])
        assert samples.relative(found, plainly([(theirs["a"], ids), (theirs["b"], ids)])) < TOLERANCE
    assert runner._broken and ours["a"].ids == theirs["a"].ids


def test_what_no_graph_runs_goes_in_one_forward(
    model: PreTrainedModel, prefixes: list[PrefixFactors], forwards: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As many tokens of questions as kernels take at once, whoever asks them; and all single tokens."""
    for module in (graph_runner, packed_cache):
        monkeypatch.setattr(module, "MOST_TOKENS", 6)
    monkeypatch.setattr(step_graph.StepGraph, "run", lambda *_: 1 / 0)
    runner, ours, theirs = GraphRunner(model), contexts(model, prefixes), contexts(model, prefixes)
    steps = [
        ({"exact": 9, "a": 4, "b": 5, "c": 3}, [[4, 2, 9], [3, 3]]),
        ({"a": 1, "b": 1, "exact": 1, "c": 1}, [[1, 1, 1, 1]]),
        ({"a": 1, "b": 7, "c": 1}, [[6, 1, 1], [1]]),
    ]
    for lengths, expected in steps:
        forwards.clear()
        ids = {name: random_ids(count, seed=count).tolist() for name, count in lengths.items()}
        found = runner.run([(ours[name], one) for name, one in ids.items()])
        assert forwards == expected
        assert (
            samples.relative(found, plainly([(theirs[name], one) for name, one in ids.items()])) < TOLERANCE
        )
    assert all(context.ids == theirs[name].ids for name, context in ours.items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_without_memory_runs_once_more_and_graphs_go_on_later(
    error: type[Exception], model: PreTrainedModel, prefixes: list[PrefixFactors], forwards: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner, ours, theirs = GraphRunner(model), contexts(model, prefixes), contexts(model, prefixes)
    real, failed, left = step_graph.StepGraph.run, [], 0

    def run(graph: step_graph.StepGraph, ids: list[int]) -> torch.Tensor:
        nonlocal left
        assert all(one() is None for one in failed)
        if left:
            left -= 1
            failed.append(weakref.ref(graph))
            graph._graph = None  # on a GPU a captured one would not run the model's modules
            handle = model.model.layers[1].register_forward_pre_hook(be_full)
            try:
                return real(graph, ids)
            finally:
                handle.remove()
        return real(graph, ids)

    def be_full(*_: object) -> None:
        raise error("CUDA error: out of memory")

    def step(token: int, fail: int = 0) -> int:
        """Ordinary forwards of a step whose graphs fail so often."""
        nonlocal left
        left, before = fail, len(forwards)
        found = runner.run([(ours[name], [token]) for name in "ab"])
        assert not left
        assert samples.relative(found, plainly([(theirs[name], [token]) for name in "ab"])) < TOLERANCE
        return len(forwards) - before

    monkeypatch.setattr(step_graph.StepGraph, "run", run)
    monkeypatch.setattr(graph_runner, "_PAUSE", 2)
    assert [step(3), step(4), step(5, fail=1), step(6)] == [1, 0, 0, 0] and len(failed) == 1
    assert [step(7, fail=2), step(8), step(9), step(10)] == [1, 1, 1, 0] and len(failed) == 3
    assert not runner._broken and all(ours[name].ids == theirs[name].ids for name in "ab")


def test_a_graph_that_stood_by_while_a_tail_moved_reads_where_it_is(
    model: PreTrainedModel, prefixes: list[PrefixFactors], watched: Watched
) -> None:
    runner, ours = GraphRunner(model), contexts(model, prefixes)
    pair = [ours["a"], ours["b"]]
    for ids in ([3, 4], [5]):
        runner.run([(context, ids) for context in pair])
    (both,) = runner._graphs.values()
    rider = runner._riders[id(ours["a"])]
    before = rider.rows[0].addresses
    fill(rider)
    runner.run([(ours["a"], [6])])
    assert rider.rows[0].addresses != before
    runner.run([(context, [7]) for context in pair])
    for index, table in both._tails.items():
        assert table.addresses[:, 0].tolist() == rider.rows[index].addresses


def test_a_layer_of_a_graph_takes_the_choice_of_the_one_before(
    model: PreTrainedModel, prefixes: list[PrefixFactors], watched: Watched
) -> None:
    one = compress(model, random_ids(120), replace(prefixes[0].spec, reuse=(1,)))
    runner, ours = GraphRunner(model), contexts(model, [one, one])
    for token in (3, 4):
        runner.run([(ours["a"], [token])])
    assert torch.equal(*watched.chosen[-2:]) and not runner._broken


def test_prefixes_with_landmarks_ride(
    model: PreTrainedModel, prefixes: list[PrefixFactors], watched: Watched
) -> None:
    """In a graph of their own: one slot of it is empty, and the last chunk of one prefix short."""
    spec = replace(prefixes[0].spec, index="landmark", landmark_chunk=4)
    marked = [compress(model, random_ids(size, seed=size), spec) for size in (120, 102)]
    runner = GraphRunner(model)
    ours, theirs = contexts(model, marked), contexts(model, marked)
    ours["sketch"], theirs["sketch"] = (contexts(model, prefixes)["a"] for _ in range(2))
    names = ("a", "b", "c", "sketch")
    for ids in ([3, 4, 5], [6], [7]):
        found = runner.run([(ours[name], ids) for name in names])
        assert samples.relative(found, plainly([(theirs[name], ids) for name in names])) < TOLERANCE
    assert not runner._broken and [graph.slots for graph in runner._graphs.values()] == [4, 1]
    assert len(watched.chosen) == 2 * 2 * len(names) or model.device.type == "cuda"


def test_a_context_that_a_forward_left_half_done_is_mended_first(
    model: PreTrainedModel, prefixes: list[PrefixFactors]
) -> None:
    """A first token that only the first layer got is none of the tail."""
    runner = GraphRunner(model)
    ours, theirs = contexts(model, prefixes)["a"], contexts(model, prefixes)["a"]
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run([(ours, [5])])
    handle.remove()
    for token in (5, 6):
        assert samples.relative(runner.run([(ours, [token])]), plainly([(theirs, [token])])) < TOLERANCE
    assert not runner._broken and runner._riders[id(ours)].count == 2


def test_a_tail_of_another_dtype_is_no_loss(model: PreTrainedModel, prefixes: list[PrefixFactors]) -> None:
    runner = GraphRunner(model)
    ours, theirs = contexts(model, prefixes)["a"], contexts(model, prefixes)["a"]
    for ids in ([3, 4, 5], [6], [7]):
        found = runner.run([(ours, ids)])
        assert samples.relative(found, plainly([(theirs, ids)])) < TOLERANCE
        for layer in ours.cache.layers:
            layer.keys, layer.values = layer.keys.half(), layer.values.half()
    assert runner._broken and ours.ids == theirs.ids


class OutOfResources(Exception):
    """As where a shape needs more shared memory than a device has."""

    __module__ = "triton.runtime.errors"


def fail(*_: object, **__: object) -> None:
    raise OutOfResources("out of resource: shared memory")


def test_kernels_that_do_not_compile_are_no_loss(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch attends, now and later."""
    runner = GraphRunner(model)
    ours, theirs = contexts(model, prefixes), contexts(model, prefixes)
    for ids in ([3, 4, 5], [6], [7]):
        if ids == [6]:
            monkeypatch.setattr("xkv_service.decoding.kernel_step.DecodeLaunch.run", fail)
        found = runner.run([(ours["a"], ids), (ours["b"], ids)])
        assert samples.relative(found, plainly([(theirs["a"], ids), (theirs["b"], ids)])) < TOLERANCE
    assert ours["a"].ids == theirs["a"].ids and kernel_choice.DEVICES == ()
    assert why_not(ours["a"].cache, Scoring(0.2)) is not None


def test_kernels_that_find_no_memory_run_again() -> None:
    """Triton loads what it compiled when it is first launched, which may be when memory is full."""
    assert not kernel_choice.turned_off(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert kernel_choice.DEVICES
    assert kernel_choice.turned_off(RuntimeError("Triton Error [CUDA]: invalid argument"))


def test_kernels_that_do_not_compile_are_no_loss_behind_windows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot go back: what they lost runs again."""
    model = tiny_model("gemma3", head_dim=32).to(device)
    spec = CompressionSpec(rank_k=24, rank_v=40, group_size=2, factor_dtype="int8")
    with enable_xkv(model):
        prefix = compress(model, random_ids(120, seed=120), spec)
        runner = GraphRunner(model)
        ours, theirs = contexts(model, [prefix, prefix]), contexts(model, [prefix, prefix])
        for ids in ([3, 4, 5], [6], [7]):
            if ids == [6]:
                monkeypatch.setattr("xkv_service.decoding.kernel_step.DecodeLaunch.run", fail)
            names = ("a", "b", "exact")
            found = runner.run([(ours[name], ids) for name in names])
            assert samples.relative(found, plainly([(theirs[name], ids) for name in names])) < TOLERANCE
    assert kernel_choice.DEVICES == () and all(ours[name].ids == theirs[name].ids for name in names)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_model_of_other_scores_is_no_failure(
    family: str, device: torch.device, forwards: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """A softcap in all layers, or sinks: only a forward finds out. One tries, and no other."""
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    model = tiny_model(family, head_dim=32, **layers).to(device)
    spec = CompressionSpec(rank_k=24, rank_v=40, group_size=2, factor_dtype="int8")
    with enable_xkv(model):
        prefix = compress(model, random_ids(120, seed=120), spec)
        runner = GraphRunner(model)
        ours, theirs = contexts(model, [prefix, prefix]), contexts(model, [prefix, prefix])
        for lengths in ({"a": 2, "b": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 2}, {"c": 1}):
            ids = {name: random_ids(count, seed=count).tolist() for name, count in lengths.items()}
            found = runner.run([(ours[name], one) for name, one in ids.items()])
            expected = plainly([(theirs[name], one) for name, one in ids.items()])
            assert samples.relative(found, expected) < TOLERANCE
    assert forwards == [[2, 2], [1, 1], [1, 1, 2], [1]]
    assert not runner._broken and kernel_choice.DEVICES
    assert not [record for record in caplog.records if record.name.startswith("xkv")]


def test_a_question_rides_from_the_second_of_its_size_on(
    model: PreTrainedModel, prefixes: list[PrefixFactors], forwards: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Alone, or behind those that decode; of no size that kernels do not take at once."""
    monkeypatch.setattr(graph_runner, "_ASKED", 2)
    runner, ours, theirs = GraphRunner(model), contexts(model, prefixes), contexts(model, prefixes)
    steps = [
        ({"a": 5}, [[5]]),
        ({"b": 7}, []),
        ({"a": 1, "b": 1}, []),
        ({"a": 1, "c": 6}, []),
        ({"a": 2, "b": 130}, [[2, 126], [4]]),
        ({"a": 3, "b": 3, "c": 9}, [[3, 3, 9]]),
        ({"a": 3, "b": 3, "c": 9}, []),
    ]
    for number, (lengths, expected) in enumerate(steps):
        forwards.clear()
        ids = {name: random_ids(count, seed=10 * number + count).tolist() for name, count in lengths.items()}
        found = runner.run([(ours[name], one) for name, one in ids.items()])
        assert [sorted(one) for one in forwards] == expected, number
        plain = plainly([(theirs[name], one) for name, one in ids.items()])
        assert samples.relative(found, plain) < TOLERANCE
    assert not runner._broken and all(context.ids == theirs[name].ids for name, context in ours.items())


def test_a_question_that_fails_in_a_graph_begins_again(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tail has not begun: nothing of it is left in the cache."""
    monkeypatch.setattr(graph_runner, "_ASKED", 1)
    runner, ours, theirs = GraphRunner(model), contexts(model, prefixes), contexts(model, prefixes)
    real = step_graph.StepGraph.run

    def run_and_fail(graph: step_graph.StepGraph, ids: list[int]) -> torch.Tensor:
        real(graph, ids)
        raise RuntimeError

    monkeypatch.setattr(step_graph.StepGraph, "run", run_and_fail)
    for ids in ([3, 4, 5], [6], [7, 8]):
        found = runner.run([(ours["a"], ids)])
        assert samples.relative(found, plainly([(theirs["a"], ids)])) < TOLERANCE
    assert runner._broken and ours["a"].cache.tail_tokens == 6


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ZeroDivisionError])
def test_a_question_that_fails_leaves_those_that_decode_in_their_graph(
    error: type[Exception], model: PreTrainedModel, prefixes: list[PrefixFactors], forwards: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(graph_runner, "_ASKED", 1)
    monkeypatch.setattr(graph_runner, "_PAUSE", 2)
    runner, ours, theirs = GraphRunner(model), contexts(model, prefixes), contexts(model, prefixes)
    real = step_graph.StepGraph.run

    def run(graph: step_graph.StepGraph, ids: list[int]) -> torch.Tensor:
        if len(ids) > 2:
            raise error
        return real(graph, ids)

    monkeypatch.setattr(step_graph.StepGraph, "run", run)
    steps = [
        ({"a": 2}, []),
        ({"b": 2}, []),
        ({"a": 1, "b": 1, "c": 4}, [[4]]),
        ({"a": 1, "b": 1, "c": 3}, [[3]]),
    ]
    for lengths, expected in steps:
        forwards.clear()
        ids = {name: random_ids(count, seed=count).tolist() for name, count in lengths.items()}
        found = runner.run([(ours[name], one) for name, one in ids.items()])
        assert forwards == expected
        plain = plainly([(theirs[name], one) for name, one in ids.items()])
        assert samples.relative(found, plain) < TOLERANCE
    assert not runner._broken and not runner._pause and runner._graphs and runner._no_questions
    if error is torch.OutOfMemoryError:
        for _ in range(2):
            runner.run([(ours["a"], [5])])
        forwards.clear()
        runner.run([(ours["a"], [5, 6])])
        assert not forwards


def test_only_so_many_graphs_of_questions_are_kept(
    model: PreTrainedModel, prefixes: list[PrefixFactors], forwards: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And one that had to leave comes back after some questions more; those of steps stay."""
    for name, value in (("_ASKED", 1), ("_KEPT_QUESTIONS", 2), ("_EARN", 3)):
        monkeypatch.setattr(graph_runner, name, value)
    runner, context = GraphRunner(model), contexts(model, prefixes)["a"]
    for count, ordinary in ((2, 0), (1, 0), (3, 0), (5, 0), (2, 1), (2, 1), (2, 0)):
        forwards.clear()
        runner.run([(context, random_ids(count).tolist())])
        assert len(forwards) == ordinary, count
    assert sorted((name[1], name[-1]) for name in runner._graphs) == [(1, False), (2, True), (8, True)]


def test_a_tail_that_begins_in_a_graph_is_not_copied(
    model: PreTrainedModel, prefixes: list[PrefixFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_runner, "_ASKED", 1)
    runner, context = GraphRunner(model), contexts(model, prefixes)["a"]
    runner.run([(context, [3, 4, 5])])
    runner.settle(context)
    room = context.cache.layers[0]._room
    context.advance([6])
    runner.run([(context, [7])])
    assert context.cache.layers[0]._room is room
