"""Decoding by kernels gives what decoding in PyTorch gives, in a cache and in a batch of many.

Choices differ where shares of two tokens are less than a bin apart: attention of these random models is
flat, so one such token changes logits by a hundredth. So every launch is also held against PyTorch's
attention to the very tokens that it chose, over the tails that the caches themselves hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import kernel_samples as samples
import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from launch_checks import check
from measured import calibrated
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import kernel_choice, kernel_step
from xkv_service.decoding.kernel_choice import why_not
from xkv_service.decoding.kernel_step import rebuilt_tokens
from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import Scoring
from xkv_service.engine.footprint import prefix_bytes
from xkv_service.engine.runners import PackedRunner
from xkv_service.engine.storages import held_bytes
from xkv_service.factors import PrefixFactors
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.packed_factors import PackedFactors
from xkv_service.sessions.context import Context
from xkv_service.spec import IndexKind

FEW = SelectionSpec(budget=80, recent=8)
TOLERANCE = 0.1
"""Relative error of logits."""


@pytest.fixture(scope="module")
def model(device: torch.device) -> PreTrainedModel:
    return tiny_model("llama", head_dim=32, num_hidden_layers=4).to(device)


@pytest.fixture(autouse=True)
def kernels(model: PreTrainedModel) -> Iterator[None]:
    """Kernels run on a CPU too."""
    with running("cpu", "cuda"), torch.no_grad(), enable_xkv(model):
        yield


@contextmanager
def running(*devices: str) -> Iterator[None]:
    """Kernels run on these kinds of device."""
    before, kernel_choice.DEVICES = kernel_choice.DEVICES, devices
    try:
        yield
    finally:
        kernel_choice.DEVICES = before


class Watched:
    """How often the kernels attended; every time is held against PyTorch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = 0
        real = kernel_step.DecodeLaunch.attend

        def attend_and_check(launch: Any, layers: Any, query: Any, scaling: Any) -> torch.Tensor:
            self.launches += 1
            out = real(launch, layers, query, scaling)
            chosen = next(iter(launch._kernels.values())).chosen
            sessions = [
                (layer, row, layer.tail_tokens - count + token + 1)
                for layer, count in zip(layers, launch._counts, strict=True)
                for row in range(len(layer.keys))
                for token in range(count)
            ]
            assert len(sessions) == len(query)
            for number, (layer, row, length) in enumerate(sessions):
                keys, values = (states[row : row + 1, :, :length] for states in (layer.keys, layer.values))
                check(layer.selection, (keys, values), query[number], scaling, chosen, number, out[number])
                assert layer.rebuilt == rebuilt_tokens(layer.selection)
            return out

        monkeypatch.setattr(kernel_step.DecodeLaunch, "attend", attend_and_check)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def compressed(
    model: PreTrainedModel, kind: str, tokens: int = 120, reuse: tuple[int, ...] = ()
) -> PrefixFactors:
    """A prefix of int8 factors with bases of its own, also with landmarks, or of mixed bits over a
    calibration's.
    """
    ids = random_ids(tokens, seed=tokens)
    if kind != "mixed":
        index: IndexKind = "landmark" if kind == "landmark" else "sketch"
        spec = CompressionSpec(
            rank_k=24, rank_v=40, group_size=2, factor_dtype="int8", reuse=reuse, index=index,
            landmark_chunk=4,
        )  # fmt: skip
        return compress(model, ids, spec)
    shared = calibrated(model)
    spec = CompressionSpec(
        calibration=shared.id,
        ratio=2.0,
        basis="calibrated",
        factor_dtype="mixed",
        index="derived",
        reuse=reuse,
    )
    return compress(model, ids, spec, shared)


def step(model: PreTrainedModel, cache: XKVCache, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids.to(model.device), past_key_values=cache).logits
    return logits


def in_pytorch(model: PreTrainedModel, cache: XKVCache, ids: torch.Tensor) -> torch.Tensor:
    with running():
        return step(model, cache, ids)


@pytest.mark.parametrize("kind", ["int8", "landmark", "mixed"])
@pytest.mark.parametrize("reuse", [(), (1, 3)])
def test_steps_of_a_cache(
    model: PreTrainedModel, watched: Watched, kind: str, reuse: tuple[int, ...]
) -> None:
    factors = compressed(model, kind, reuse=reuse)
    ours, theirs = (XKVCache.from_factors(model, factors, FEW) for _ in range(2))
    for number, count in enumerate((5, 1, 1, 1, 3, 1, 1)):
        ids, before = random_ids(count, seed=number)[None], watched.launches
        assert samples.relative(step(model, ours, ids), in_pytorch(model, theirs, ids)) < TOLERANCE
        assert watched.launches - before == 4
        if kind == "landmark":  # at most so many
            assert ours.rebuilt_tokens >= theirs.rebuilt_tokens or count > 1
        else:
            assert ours.rebuilt_tokens == theirs.rebuilt_tokens or count > 1


def test_a_layer_that_followed_in_another_cache_chooses_by_its_own_index(
    model: PreTrainedModel, watched: Watched
) -> None:
    """As a calibration tries one set of layers that reuse a choice after the other, on the same prefix."""
    prefix = Prefix.of(model, compressed(model, "int8"))
    for reuse, chooses in (((1, 2), 0), ((2,), 1), ((), 2)):
        cache = XKVCache(replace(prefix, reuse=frozenset(reuse)), FEW)
        step(model, cache, random_ids(1)[None])
        found = kernel_step.document_of(cache, 2).index.codes
        assert torch.equal(found, prefix.layers[chooses].index.sketch.codes)
    assert watched.launches == 3 * 4


def test_rows_forks_beams_and_tokens_taken_back(model: PreTrainedModel, watched: Watched) -> None:
    """Whatever becomes of a tail between steps, what is kept of it is not attended to by mistake."""
    factors = compressed(model, "int8")
    ours, theirs = (XKVCache.from_factors(model, factors, FEW) for _ in range(2))
    both = (ours, theirs)

    def one(*seeds: int) -> None:
        ids = torch.cat([random_ids(1, seed=seed)[None] for seed in seeds])
        assert samples.relative(step(model, both[0], ids), in_pytorch(model, both[1], ids)) < TOLERANCE

    one(1, 2, 3)
    one(4, 5, 6)
    for cache in both:
        cache.reorder_cache(torch.tensor([2, 2, 0], device=model.device))
    one(7, 8, 9)
    for cache in both:
        cache.crop(-1)
    one(10, 11, 12)
    forks = [cache.fork() for cache in both]
    one(13, 14, 15)
    both = (forks[0], forks[1])
    one(16, 17, 18)
    both = (ours, theirs)
    one(19, 20, 21)
    for cache in both:
        cache.reset()
    one(22)
    assert watched.launches == 4 * 8


def test_masks_that_are_not_causal_go_through_pytorch(model: PreTrainedModel, watched: Watched) -> None:
    """Padding before a question, and many tokens at once."""
    factors = compressed(model, "int8")
    ours, theirs = (XKVCache.from_factors(model, factors, FEW) for _ in range(2))
    mask = torch.ones(1, 126, dtype=torch.int64, device=model.device)
    mask[:, 121] = 0
    ids = random_ids(6)[None].to(model.device)
    logits = [model(ids, past_key_values=cache, attention_mask=mask).logits for cache in (ours, theirs)]
    assert torch.equal(*logits) and watched.launches == 0
    many = random_ids(kernel_choice.MOST_TOKENS + 1)[None]
    step(model, XKVCache.from_factors(model, factors, FEW), many)
    assert watched.launches == 0


def contexts(model: PreTrainedModel, prefixes: list[PrefixFactors]) -> list[Context]:
    """Three sequences: two over the first prefix, one over the second."""
    found = []
    for number, budget in ((0, 80), (1, 60), (0, 90)):
        cache = XKVCache.from_factors(model, prefixes[number], SelectionSpec(budget=budget, recent=8))
        found.append(Context(model, cache, prefixes[number].token_ids.tolist()))
    return found


@pytest.mark.parametrize("kind", ["int8", "landmark", "mixed"])
def test_a_batch_that_changes_between_steps(model: PreTrainedModel, watched: Watched, kind: str) -> None:
    prefixes = [compressed(model, kind, size, (1,)) for size in (120, 150)]
    runner, plain = PackedRunner(model), PackedRunner(model)
    ours, theirs = contexts(model, prefixes), contexts(model, prefixes)
    plan = [
        {0: 5, 1: 1, 2: 3}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1}, {0: 1, 2: 1}, {0: 1, 1: 7, 2: 1},
        {2: 1, 1: 1, 0: 1}, {2: 1, 1: 1, 0: 1}, {1: 1},
    ]  # fmt: skip
    for number, lengths in enumerate(plan):
        ids = {
            place: random_ids(count, seed=10 * number + place).tolist() for place, count in lengths.items()
        }
        before = watched.launches
        found = runner.run([(ours[place], one) for place, one in ids.items()])
        assert watched.launches > before
        with running():
            expected = plain.run([(theirs[place], one) for place, one in ids.items()])
        assert samples.relative(found, expected) < TOLERANCE


def test_two_prefixes_of_one_layout_are_one_launch_and_its_tables_stay(
    model: PreTrainedModel, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = [compressed(model, "int8", size) for size in (120, 121)]
    made = []
    monkeypatch.setattr(
        kernel_step, "DocumentTable", lambda *given: made.append(given) or kernel_step_table(*given)
    )
    runner, found = PackedRunner(model), contexts(model, prefixes)
    for number in range(4):
        runner.run([(one, [5 + number]) for one in found])
    assert (watched.launches, len(made)) == (16, 4)
    del found[1]
    runner.run([(one, [9]) for one in found])
    assert (watched.launches, len(made)) == (20, 8)
    assert runner._launches._launches
    found.clear()
    assert not runner._launches._launches, "a batch that is no more keeps its prefixes in memory"


kernel_step_table = kernel_step.DocumentTable


@pytest.mark.parametrize("kind", ["int8", "mixed"])
def test_what_a_prefix_holds_for_kernels_was_reserved(model: PreTrainedModel, kind: str) -> None:
    """Its token factors stand in rows, once; which tokens may be chosen is made when they first are."""
    factors = compressed(model, kind, 500)
    manifest = manifest_of(factors)
    shared = calibrated(model) if kind == "mixed" else None
    read = PrefixFactors.from_tensors(manifest, factors.to_tensors(), shared)
    prefix = Prefix.of(model, read)
    promised = prefix_bytes(model, manifest, factors.spec)
    for layer in prefix.layers.values():
        assert isinstance(layer, LayerPrefix)
        for one in layer.token_factors:
            data = FactorRows.of(one).data
            first = one.pieces[0] if isinstance(one, PackedFactors) else one
            assert data.data_ptr() == first.data_ptr()
    held = held_bytes(prefix, device=model.device, besides=shared)
    cache = XKVCache(prefix, FEW)
    step(model, cache, random_ids(1)[None])
    states = sum(
        document.states.nbytes
        for layer in prefix.layers.values()
        for document in kernel_step._DOCUMENTS[layer].values()
    )
    assert states == 4 * 500
    assert 0.8 * promised < held + states <= promised


def test_what_kernels_do_not_take_goes_through_pytorch(
    model: PreTrainedModel, watched: Watched, device: torch.device
) -> None:
    factors, plain = compressed(model, "int8"), Scoring(0.2)

    def reason(selection: SelectionSpec = FEW, scoring: Scoring = plain, **spec: Any) -> str:
        made = compress(model, random_ids(120), replace(factors.spec, **spec)) if spec else factors
        cache = XKVCache.from_factors(model, made, selection)
        found = why_not(cache, scoring)
        assert found is not None
        if scoring is plain:
            step(model, cache, random_ids(1)[None])
        return found

    assert why_not(XKVCache.from_factors(model, factors, FEW), plain) is None
    assert "softcap" in reason(scoring=Scoring(0.2, softcap=30.0))
    assert "sinks" in reason(scoring=Scoring(0.2, sinks=torch.zeros(4)))
    assert "KV head" in reason(replace(FEW, granularity="head"))
    assert "neither by a key sketch" in reason(SelectionSpec("exact", 40))
    assert "attended to" in reason(SelectionSpec("dense"))
    assert "attended to" in reason(SelectionSpec("sketch", 1.0))
    assert "odd" in reason(sketch_planes=3)
    with running():
        assert "missing" in reason()
    folded = XKVCache.from_factors(model, factors, FEW)
    assert watched.launches == 0
    step(model, folded, random_ids(9)[None])
    folded.fold(keep=2)
    assert "folded" in str(why_not(folded, plain))
    before = watched.launches
    step(model, folded, random_ids(1)[None])
    assert watched.launches == before


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, "16 dimensions"),
        ("llama", {"head_dim": 128}, "128 dimensions"),
        ("gpt_neox", {}, "turned|dimensions"),
        ("deepseek_v3", {}, "latent"),
    ],
)
def test_models_that_kernels_do_not_take(
    device: torch.device, family: str, changes: dict[str, Any], expected: str
) -> None:
    other = tiny_model(family, **changes).to(device)
    factors = compress(other, random_ids(120), CompressionSpec(rank_k=16, rank_v=16, group_size=1))
    found = why_not(XKVCache.from_factors(other, factors, SelectionSpec(budget=20)), Scoring(0.2))
    assert any(one in str(found) for one in expected.split("|"))
