"""Packed tokens of many sequences give what each sequence gives alone."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import FAMILIES, HYBRID, LATENT, tiny_model
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.engine.runners import PackedRunner, SeparateRunner, make_runner
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.selection.reuse import followers
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import empty_context

BY_LENGTH = ["llama-dynamic", "phi3-longrope"]
SEPARATE = ["deepseek_v3", "qwen3_next", *BY_LENGTH]
PACKED = [family for family in FAMILIES if family not in (*LATENT, *HYBRID, *BY_LENGTH)]
SELECTION = SelectionSpec(budget=20, recent=4)


def _contexts(model: PreTrainedModel, *, reuse: bool = False) -> list[Context]:
    """Sequences over two compressed prefixes, two of one, and exact ones."""
    layers = sorted(followers(inspect_loaded(model).layout.compressible)) if reuse else []
    spec = CompressionSpec(group_size=2, rank_k=24, rank_v=24, reuse=tuple(layers))
    prefixes = [compress(model, random_ids(size, seed=size), spec) for size in (48, 64)]
    contexts = []
    for factors in (prefixes[0], prefixes[1], prefixes[0]):
        cache = XKVCache.from_factors(model, factors, SELECTION)
        contexts.append(Context(model, cache, factors.token_ids.tolist()))
    return [*contexts, empty_context(model), empty_context(model)]


@pytest.mark.parametrize(
    ("family", "reuse"),
    [*((family, False) for family in PACKED), ("llama", True), ("gemma2", True), ("gpt_oss", True)],
)
def test_packed_is_as_each_alone(family: str, reuse: bool) -> None:
    """Also where layers take what the layer before them chose."""
    model = tiny_model(family)
    with enable_xkv(model):
        runner = make_runner(model)
        assert isinstance(runner, PackedRunner)
        together = _contexts(model, reuse=reuse)
        apart = [context.fork() for context in together]
        for step in range(4):
            lengths = [(5, 1, 3, 40, 2), (1, 1, 1, 1, 1), (1, 7, 1, 1, 12)][step % 3]
            ids = [random_ids(size, seed=10 * step + place).tolist() for place, size in enumerate(lengths)]
            packed = runner.run(list(zip(together, ids, strict=True)))
            alone = SeparateRunner().run(list(zip(apart, ids, strict=True)))
            torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)
        assert [context.ids for context in together] == [context.ids for context in apart]


@pytest.mark.parametrize("family", SEPARATE)
def test_models_that_cannot_be_packed_run_one_by_one(family: str) -> None:
    model = tiny_model(family)
    with enable_xkv(model):
        assert isinstance(make_runner(model), SeparateRunner)


def test_sequences_come_and_go_and_fork_between_steps() -> None:
    model = tiny_model("llama")
    with enable_xkv(model):
        runner = PackedRunner(model)
        first, second = _contexts(model)[:2]
        runner.run([(first, [5, 6, 7]), (second, [8])])
        fork, alone = first.fork(), first.fork()
        runner.run([(first, [9]), (fork, [11])])
        runner.run([(second, [12]), (fork, [13])])
        first.rewind(len(first.ids) - 2)
        one, two = runner.run([(first, [14]), (fork, [15])])
        expected = alone.fork()
        torch.testing.assert_close(two, expected.advance([11, 13, 15]), atol=2e-4, rtol=1e-4)
        alone.rewind(len(alone.ids) - 1)
        torch.testing.assert_close(one, alone.advance([14]), atol=2e-4, rtol=1e-4)


def test_a_forward_that_fails_leaves_every_sequence_as_it_was() -> None:
    model = tiny_model("llama")
    with enable_xkv(model):
        runner = PackedRunner(model)
        first, second = _contexts(model)[:2]
        runner.run([(first, [5, 6]), (second, [8])])
        before = [first.fork(), second.fork()]
        handle = model.model.layers[1].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="no memory"):
            runner.run([(first, [9]), (second, [10])])
        handle.remove()
        after = runner.run([(first, [11]), (second, [12])])
        expected = SeparateRunner().run([(before[0], [11]), (before[1], [12])])
        torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def _fail(*_: object) -> None:
    raise RuntimeError("no memory")
