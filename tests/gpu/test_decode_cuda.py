"""Decoding by kernels on a GPU answers as decoding in PyTorch does. Run with `pytest -m gpu`.

The bundled model, compressed documents of its question generator, greedy answers on the same device. Choices
differ where two tokens' shares are less than a bin apart, and numbers of 16 bits are rounded elsewhere.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.decoding import kernel_choice
from xkv_service.decoding.kernel_choice import why_not
from xkv_service.decoding.scoring import Scoring
from xkv_service.demo import demo_calibration_path, demo_model_path
from xkv_service.demo.documents import Document, make_document
from xkv_service.engine.runners import PackedRunner, Runner, make_runner
from xkv_service.evaluation.rendering import Renderer
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.joined_products import join_products
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.sessions.context import Context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

QUESTIONS, TOKENS, LONGEST = 12, 4000, 48
"""Questions of each of two documents, about so many tokens of a document, and tokens of an answer at most."""


@contextmanager
def in_pytorch() -> Iterator[None]:
    before, kernel_choice.DEVICES = kernel_choice.DEVICES, ()
    try:
        yield
    finally:
        kernel_choice.DEVICES = before


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(demo_model_path(), dtype=request.param, device="cuda")


@pytest.fixture(scope="module")
def documents(loaded: LoadedModel) -> list[tuple[Document, list[int]]]:
    """Two documents of different lengths, and the tokens of their prefixes."""

    def measure(text: str) -> int:
        return len(loaded.tokenizer(text, add_special_tokens=False).input_ids)

    made = [make_document(Random(seed), TOKENS - 700 * seed, measure) for seed in range(2)]
    return [(one, Renderer(loaded.tokenizer).prefix(one.text)) for one in made]


@pytest.fixture(scope="module", params=["int8", "landmark", "calibrated"])
def prefixes(
    request: pytest.FixtureRequest, loaded: LoadedModel, documents: list[tuple[Document, list[int]]]
) -> list[PrefixFactors]:
    """int8 factors over bases of their own, with sketches or landmarks, or mixed bits over the bundled
    calibration's, layers reusing.
    """
    calibration = None
    if request.param == "int8":
        spec = CompressionSpec(ratio=6.0, factor_dtype="int8")
    elif request.param == "landmark":
        spec = CompressionSpec(ratio=6.0, factor_dtype="int8", index="landmark")
    else:
        calibration = read_calibration_file(demo_calibration_path())
        spec = calibrated_spec(8.0, calibration)
    return [compress(loaded.model, torch.tensor(ids), spec, calibration) for _, ids in documents]


def sequences(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors]
) -> list[tuple[Context, list[int]]]:
    """A cache for each question, and the tokens still to run: questions of both documents in turns."""
    renderer, found = Renderer(loaded.tokenizer), []
    for number in range(QUESTIONS):
        for (document, ids), factors in zip(documents, prefixes, strict=True):
            prompt = renderer.prompt(document.text, [], document.questions[number].question)
            assert prompt[: len(ids)] == ids
            cache = XKVCache.from_factors(loaded.model, factors, SelectionSpec(budget=256))
            found.append((Context(loaded.model, cache, list(ids)), prompt[len(ids) :]))
    return found


def by_graphs(loaded: LoadedModel, work: list[tuple[Context, list[int]]]) -> list[list[int]]:
    """As the engine runs them: without kernels in ordinary forwards."""
    return batched(loaded, work, make_runner(loaded.model))


def in_forwards(loaded: LoadedModel, work: list[tuple[Context, list[int]]]) -> list[list[int]]:
    """Kernels without graphs."""
    return batched(loaded, work, PackedRunner(loaded.model))


def batched(loaded: LoadedModel, work: list[tuple[Context, list[int]]], runner: Runner) -> list[list[int]]:
    """Greedy answers, all sequences in one batch; each leaves when its answer has ended."""
    ends = loaded.model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    found: list[list[int]] = [[] for _ in work]
    active: dict[int, list[int]] = {number: ids for number, (_, ids) in enumerate(work)}
    for _ in range(LONGEST):
        logits = runner.run([(work[number][0], ids) for number, ids in active.items()])
        following = zip(list(active), logits.argmax(-1).tolist(), strict=True)
        active = {}
        for number, token in following:
            if token in ends:
                runner.settle(work[number][0])
            else:
                found[number].append(token)
                active[number] = [token]
        if not active:
            break
    return found


def alone(loaded: LoadedModel, work: list[tuple[Context, list[int]]]) -> list[list[int]]:
    """Greedy answers of Transformers' `generate`, one sequence after the other."""
    found = []
    for context, ids in work:
        whole = torch.tensor([[*context.ids, *ids]], device="cuda")
        options: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False}
        out = loaded.model.generate(whole, past_key_values=context.cache, **options)
        found.append(out[0, whole.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("ask", [by_graphs, in_forwards, alone])
def test_answers_are_those_of_pytorch(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors], ask: Any
) -> None:
    """At most one of 24 differs, and as many are right."""
    with torch.no_grad(), enable_xkv(loaded.model):
        ours, theirs = (sequences(loaded, documents, prefixes) for _ in range(2))
        cache = ours[0][0].cache
        assert isinstance(cache, XKVCache)
        assert why_not(cache, Scoring(1.0)) is None
        begin = time.perf_counter()
        found = ask(loaded, ours)
        middle = time.perf_counter()
        with in_pytorch():
            expected = ask(loaded, theirs)
        end = time.perf_counter()
    same = sum(map(list.__eq__, found, expected))
    ours_right, theirs_right = right(loaded, documents, found), right(loaded, documents, expected)
    print(
        f"{ask.__name__}: {same} of {len(found)} the same; right: {ours_right} by kernels, "
        f"{theirs_right} in PyTorch; {middle - begin:.1f} s (compiling included) and {end - middle:.1f} s"
    )
    assert same >= len(found) - 1
    assert ours_right >= theirs_right - 1


def right(loaded: LoadedModel, documents: list[tuple[Document, list[int]]], made: list[list[int]]) -> int:
    """How many answers have all that their question asks for."""
    wanted = [one.questions[number] for number in range(QUESTIONS) for one, _ in documents]
    texts = [loaded.tokenizer.decode(ids) for ids in made]
    return sum(
        all(value in text for value in question.values) for text, question in zip(texts, wanted, strict=True)
    )


def test_answers_from_rebuilt_prefixes_are_right(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twelve sequences on each of two documents, which attend to all of it: as many are right.

    In 16 bits cuDNN reads most of the documents, which are short for that, and have few sequences.
    """
    from xkv_service.engine import graph_runner
    from xkv_service.engine.graph_runner import GraphRunner
    from xkv_service.engine.step_graph import StepGraph
    from xkv_service.kernels import cudnn_attention, shared_attention

    monkeypatch.setattr(graph_runner, "SETTLED", 2)
    monkeypatch.setattr(cudnn_attention, "LEAST", 1024)
    monkeypatch.setattr(shared_attention, "_ROWS", (16,))

    shared: list[bool] = []
    real = StepGraph.run

    def run(graph: StepGraph, ids: list[int]) -> torch.Tensor:
        shared.append(all(rider.rebuilt is not None for rider in graph._riders))
        return real(graph, ids)

    with torch.no_grad(), enable_xkv(loaded.model):
        ours, theirs = (sequences(loaded, documents, prefixes) for _ in range(2))
        runner = make_runner(loaded.model, 2**30)
        assert isinstance(runner, GraphRunner)
        both = [context.cache.prefix for context, _ in ours]
        while not all(runner._rebuilt.of(prefix) for prefix in both):
            runner._rebuilt.heed(both)
        monkeypatch.setattr(StepGraph, "run", run)
        found = batched(loaded, ours, runner)
        with in_pytorch():
            expected = by_graphs(loaded, theirs)
    same = sum(map(list.__eq__, found, expected))
    ours_right, theirs_right = right(loaded, documents, found), right(loaded, documents, expected)
    print(f"{same} of {len(found)} the same; right: {ours_right}, {theirs_right} in PyTorch by choosing")
    assert any(shared) and not runner._broken
    hopper = torch.cuda.get_device_capability()[0] >= 9
    assert bool(runner.fixed_documents) is (hopper and loaded.model.dtype == torch.bfloat16)
    assert ours_right >= theirs_right - 1


def test_answers_with_joined_products_and_compiled_parts_are_those_without(
    documents: list[tuple[Document, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs in float32, on models of the same weights."""
    from xkv_service.engine.graph_runner import GraphRunner  # needs Triton

    found = []
    for join, compiled in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(kernel_choice, "COMPILES", compiled)
        here = load_model(demo_model_path(), dtype="float32", device="cuda")
        spec = CompressionSpec(ratio=6.0, factor_dtype="int8")
        prefixes = [compress(here.model, torch.tensor(ids), spec) for _, ids in documents]
        with torch.no_grad(), enable_xkv(here.model):
            assert not join or join_products(here.model) > 0
            runner = GraphRunner(here.model)
            found.append(batched(here, sequences(here, documents, prefixes), runner))
        assert not runner._broken and runner._graphs and runner._compiled.on is compiled
    for other in found[1:]:
        assert sum(map(list.__eq__, found[0], other)) >= len(other) - 1


def test_a_step_keeps_its_tables_and_buffers(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors]
) -> None:
    """Nothing is made anew while the batch stays the same, and no memory is left when it goes."""
    with torch.no_grad(), enable_xkv(loaded.model):
        runner, work = PackedRunner(loaded.model), sequences(loaded, documents, prefixes)[:6]
        runner.run(work)
        steps = [(context, [7]) for context, _ in work]
        runner.run(steps)
        kept = runner._launches._launches
        assert sum(len(places) for places, _ in kept) == len(work)
        runner.run(steps)
        assert runner._launches._launches is kept
        del steps, work, kept
    assert not runner._launches._launches


def test_a_graph_is_captured_while_other_threads_take_memory(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors]
) -> None:
    """Prefixes are loaded meanwhile, by threads with streams of their own."""
    from xkv_service.engine.graph_runner import GraphRunner  # needs Triton

    stop, failures = threading.Event(), []

    def take() -> None:
        kept: list[torch.Tensor] = []
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    kept.append(torch.ones(3 * 2**20, device="cuda"))
                    if len(kept) > 64:
                        kept.clear()
                        torch.cuda.current_stream().synchronize()
        except Exception as error:  # noqa: BLE001 - shown to the test
            failures.append(error)

    thread = threading.Thread(target=take)
    with torch.no_grad(), enable_xkv(loaded.model):
        runner = GraphRunner(loaded.model)
        work, same = (sequences(loaded, documents, prefixes)[:3] for _ in range(2))
        plain = PackedRunner(loaded.model)
        runner.run(work), plain.run(same)
        thread.start()
        try:
            for place in range(1, 4):  # a graph of each size
                found = runner.run([(context, [7]) for context, _ in work[:place]])
                with in_pytorch():
                    expected = plain.run([(context, [7]) for context, _ in same[:place]])
                assert (found - expected).norm() < 0.1 * expected.norm()
        finally:
            stop.set()
            thread.join()
    assert not runner._broken and not failures
    assert all(graph._graph is not None for graph in runner._graphs.values())


def test_a_capture_waits_for_nothing_and_empties_no_caches(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Loads beside it would wait, and take and pin memory again. All captures are on one stream."""
    from xkv_service.engine.graph_runner import GraphRunner  # needs Triton
    from xkv_service.engine.step_graph import StepGraph

    called, streams, forward = [], [], StepGraph._forward

    def watched(graph: StepGraph) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        return forward(graph)

    with torch.no_grad(), enable_xkv(loaded.model):
        runner, work = GraphRunner(loaded.model), sequences(loaded, documents, prefixes)[:3]
        runner.run(work)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
        monkeypatch.setattr(StepGraph, "_forward", watched)
        for place in range(1, 4):  # a graph of each size
            runner.run([(context, [7]) for context, _ in work[:place]])
    assert not runner._broken and len(runner._graphs) == 3
    assert not called and set(streams) == {runner._stream}


@pytest.mark.parametrize("at", [1, 3], ids=["before a capture", "in a capture"])
def test_a_capture_without_memory_is_tried_again(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]], prefixes: list[PrefixFactors],
    at: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from xkv_service.engine.graph_runner import GraphRunner  # needs Triton

    mlp, calls = loaded.model.model.layers[0].mlp, []  # nothing compiled stands in its place
    own = mlp.forward

    def full(states: torch.Tensor) -> torch.Tensor:
        calls.append(torch.cuda.is_current_stream_capturing())
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result: torch.Tensor = own(states)
        return result

    with torch.no_grad(), enable_xkv(loaded.model):
        runner, plain = GraphRunner(loaded.model), PackedRunner(loaded.model)
        work, same = (sequences(loaded, documents, prefixes)[:3] for _ in range(2))
        runner.run(work), plain.run(same)
        runner.run([(work[0][0], [7])]), plain.run([(same[0][0], [7])])  # a graph that goes
        for forward in (full, own):
            monkeypatch.setattr(mlp, "forward", forward)
            found = runner.run([(context, [7]) for context, _ in work])
            monkeypatch.setattr(mlp, "forward", own)
            with in_pytorch():
                expected = plain.run([(context, [7]) for context, _ in same])
            assert (found - expected).norm() < 0.1 * expected.norm()
    assert len(calls) == at + 3 and calls[-1] and calls[at - 1] == (at == 3)
    assert not runner._broken and not runner._pause and len(runner._graphs) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_of_two_devices_has_graphs_of_its_own(
    loaded: LoadedModel, documents: list[tuple[Document, list[int]]]
) -> None:
    """Whichever is current: what compresses a document runs where it is, too."""
    from xkv_service.engine.graph_runner import GraphRunner  # needs Triton

    spec, dtype = CompressionSpec(ratio=6.0, factor_dtype="int8"), str(loaded.model.dtype)
    for number in range(2):
        here = load_model(demo_model_path(), dtype=dtype.removeprefix("torch."), device=f"cuda:{number}")
        prefixes = [compress(here.model, torch.tensor(ids), spec) for _, ids in documents]
        with torch.no_grad(), enable_xkv(here.model):
            runner, plain = GraphRunner(here.model), PackedRunner(here.model)
            work, same = (sequences(here, documents, prefixes)[:3] for _ in range(2))
            runner.run(work), plain.run(same)
            for _ in range(3):
                found = runner.run([(context, [7]) for context, _ in work])
                with in_pytorch():
                    expected = plain.run([(context, [7]) for context, _ in same])
                assert (found - expected).norm() < 0.1 * expected.norm()
        assert not runner._broken and runner._stream.device == torch.device("cuda", number)
