"""Layers without an index attend to what the layer before them chose, in the very same call."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_artifacts.errors import CorruptArtifact
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import attend as attention
from xkv_service.decoding import cache_layer
from xkv_service.decoding.scoring import Scoring
from xkv_service.decoding.select import Choosing, Recorded, Selected
from xkv_service.errors import CacheMisuse, InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.reconstruct import dense_cache
from xkv_service.selection.reuse import followers

PREFIX = 60
FEW = SelectionSpec("sketch", 12, recent=4)


def spec_of(*reuse: int, **fields: Any) -> CompressionSpec:
    return CompressionSpec(group_size=2, rank_k=24, rank_v=24, reuse=reuse, **fields)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def factors(model: PreTrainedModel) -> PrefixFactors:
    return compress(model, random_ids(PREFIX), spec_of(1, 3))


@pytest.fixture(autouse=True)
def enabled(model: PreTrainedModel) -> Iterator[None]:
    with torch.no_grad(), enable_xkv(model):
        yield


def logits_of(model: PreTrainedModel, cache: XKVCache, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache, **options).logits
    return logits


class Watched:
    """`attend` as layers call it, with what was chosen, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[Selected]] = []

    def __call__(
        self, query: Any, keys: Any, values: Any, mask: Any, choosing: Choosing, scoring: Scoring
    ) -> Any:
        watched = Recorded(choosing)
        self.calls.append(watched.made)
        return attention.attend(query, keys, values, mask, watched, scoring)


def _same(left: Selected, right: Selected) -> bool:
    if left.member is None or right.member is None:
        return left.member is right.member and torch.equal(left.positions, right.positions)
    return torch.equal(left.positions, right.positions) and torch.equal(left.member, right.member)


@pytest.mark.parametrize("piece", [2**25, 900])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_layer_attends_to_what_the_one_before_chose(
    model: PreTrainedModel,
    factors: PrefixFactors,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    granularity: Any,
) -> None:
    watched = Watched()
    monkeypatch.setattr(cache_layer, "attend", watched)
    monkeypatch.setattr(attention, "_PIECE", piece)
    cache = XKVCache.from_factors(model, factors, replace(FEW, granularity=granularity))
    for count in (9, 1):
        logits_of(model, cache, random_ids(count, seed=count)[None])
        first, second, third, fourth = watched.calls
        assert len(first) == (1 if piece > 900 or count == 1 else 3)
        for leader, follower in ((first, second), (third, fourth)):
            assert len(leader) == len(follower) and all(map(_same, leader, follower))
        assert not all(map(_same, first, third))
        watched.calls.clear()
    rebuilt = [layer.rebuilt for layer in cache.layers]
    assert rebuilt[0] == rebuilt[1] >= 16 and rebuilt[2] == rebuilt[3] >= 16


def test_several_layers_in_a_row_take_the_same_choice(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compress(model, random_ids(PREFIX), spec_of(1, 2, 3))
    watched = Watched()
    monkeypatch.setattr(cache_layer, "attend", watched)
    logits_of(model, XKVCache.from_factors(model, made, FEW), random_ids(5)[None])
    first, *others = watched.calls
    assert all(_same(first[0], other[0]) for other in others)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_with_every_token_chosen_logits_are_those_of_the_dense_rebuild(family: str) -> None:
    """Whatever windows and states stand between the layers."""
    other = tiny_model(family)
    made = compress(other, random_ids(PREFIX), spec_of(*followers(inspect_loaded(other).layout.compressible)))
    assert made.spec.reuse
    cache = XKVCache.from_factors(other, made, SelectionSpec("sketch", 1.0, recent=0))
    expected = other(random_ids(5, seed=3)[None], past_key_values=dense_cache(other, made)).logits
    with enable_xkv(other):
        found = logits_of(other, cache, random_ids(5, seed=3)[None])
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_question_at_once_and_token_by_token_is_answered_alike(
    model: PreTrainedModel, factors: PrefixFactors
) -> None:
    ids = random_ids(7, seed=5)
    whole = logits_of(model, XKVCache.from_factors(model, factors, FEW), ids[None])[0]
    cache = XKVCache.from_factors(model, factors, FEW)
    steps = torch.cat([logits_of(model, cache, one[None, None])[0] for one in ids])
    torch.testing.assert_close(whole, steps, atol=1e-5, rtol=1e-4)
    own = XKVCache.from_factors(model, compress(model, random_ids(PREFIX), spec_of()), FEW)
    assert not torch.allclose(whole, logits_of(model, own, ids[None])[0], atol=1e-3)


def test_left_padded_rows_are_answered_as_each_alone(model: PreTrainedModel, factors: PrefixFactors) -> None:
    rows = [random_ids(4, seed=1), random_ids(9, seed=2)]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, PREFIX + 9, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, 9 - len(row) :] = row
        mask[number, PREFIX : PREFIX + 9 - len(row)] = 0
    positions = mask.cumsum(-1)[:, PREFIX:] - 1
    cache = XKVCache.from_factors(model, factors, FEW)
    both = logits_of(model, cache, ids, attention_mask=mask, position_ids=positions)
    for number, row in enumerate(rows):
        alone = logits_of(model, XKVCache.from_factors(model, factors, FEW), row[None])[0]
        torch.testing.assert_close(both[number, -len(row) :], alone, atol=1e-5, rtol=1e-4)


def test_caches_in_several_threads_share_no_choice(model: PreTrainedModel, factors: PrefixFactors) -> None:
    first = XKVCache.from_factors(model, factors, FEW)
    logits_of(model, first, random_ids(6, seed=1)[None])
    questions = [random_ids(3 + seed % 3, seed=seed) for seed in range(8)]

    def answer(ids: torch.Tensor) -> torch.Tensor:
        cache = first.fork()
        with torch.no_grad():
            return torch.cat([logits_of(model, cache, one[None, None])[0] for one in ids])

    expected = [answer(ids) for ids in questions]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(answer, questions), expected))


def test_a_call_that_broke_off_leaves_no_choice_behind(
    model: PreTrainedModel, factors: PrefixFactors, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = XKVCache.from_factors(model, factors, FEW)
    logits_of(model, cache, random_ids(6, seed=1)[None])
    fork = cache.fork()
    expected = logits_of(model, cache.fork(), random_ids(3, seed=2)[None])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(model, fork, random_ids(5, seed=4)[None])
    assert torch.equal(logits_of(model, cache, random_ids(3, seed=2)[None]), expected)
    with pytest.raises(CacheMisuse, match="layer 1 attends"):
        cache.layers[1].attend(None)


def test_a_folded_tail_and_a_reset_keep_following(model: PreTrainedModel, factors: PrefixFactors) -> None:
    cache = XKVCache.from_factors(model, factors, FEW)
    first = logits_of(model, cache, random_ids(9, seed=1)[None])
    folded = cache.fork()
    assert folded.fold(keep=2, error=1e-4) == 7
    follower = folded.layers[1]
    assert follower.selection.reuses and follower.selection.prefix.parts[0].sketch is None
    assert torch.isfinite(logits_of(model, folded, random_ids(4, seed=2)[None])).all()
    folded.reset()
    assert torch.equal(logits_of(model, folded, random_ids(9, seed=1)[None]), first)


@pytest.mark.parametrize("selector", ["exact", "dense"])
def test_without_an_index_every_layer_chooses_for_itself(
    model: PreTrainedModel, factors: PrefixFactors, selector: Any
) -> None:
    cache = XKVCache.from_factors(model, factors, SelectionSpec(selector, 12))
    own = XKVCache.from_factors(model, compress(model, random_ids(PREFIX), spec_of()), cache.selection)
    ids = random_ids(4, seed=2)[None]
    torch.testing.assert_close(logits_of(model, cache, ids), logits_of(model, own, ids))


@pytest.mark.parametrize("index", ["sketch", "derived", "landmark"])
def test_reusing_layers_store_no_index_and_ids_stay_as_they_were(model: PreTrainedModel, index: Any) -> None:
    made = compress(model, random_ids(PREFIX), spec_of(1, 3, index=index))
    names = [name for name in made.to_tensors() if "sketch" in name or "landmark" in name]
    assert {name.split(".")[1] for name in names} == {"0", "2"}
    manifest = manifest_of(made)
    assert manifest.spec["reuse"] == [1, 3] and "reuse" not in spec_of().canonical()
    read = PrefixFactors.from_tensors(manifest, made.to_tensors())
    assert read.spec == made.spec
    spec, ids = SelectionSpec(budget=12), random_ids(4, seed=2)[None]
    caches = [XKVCache.from_factors(model, one, spec) for one in (made, read)]
    assert torch.equal(*(logits_of(model, one, ids) for one in caches))


@pytest.mark.parametrize("reuse", [[0], [7], [1, 1], [3, 1], [-1], ["1"], "13", None])
def test_a_header_that_reuses_what_is_not_there_is_refused(factors: PrefixFactors, reuse: Any) -> None:
    manifest = manifest_of(factors)
    damaged = manifest.model_copy(update={"spec": {**manifest.spec, "reuse": reuse}})
    with pytest.raises(CorruptArtifact, match="reuse"):
        PrefixFactors.from_tensors(damaged, factors.to_tensors())


def test_layers_of_other_heads_or_none_before_them_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InvalidSpec, match=r"reuse=\[0\]"):
        compress(model, random_ids(PREFIX), spec_of(0, 1))
    with pytest.raises(InvalidSpec, match="outlier_chunks"):
        spec_of(1, outlier_chunks=2)
    with pytest.raises(InvalidSpec, match="index='none'"):
        spec_of(1, index="none")
    latent = tiny_model("deepseek_v3")
    with pytest.raises(InvalidSpec, match=r"reuse=\[1\]"):
        compress(latent, random_ids(PREFIX), spec_of(1))
