"""Attention over factors against a slow reference: one query token and one head at a time, values rebuilt."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service import CompressionSpec, SelectionSpec, compress
from xkv_service.decoding import attend as module
from xkv_service.decoding.attend import attend
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import Scoring, SketchScorer
from xkv_service.decoding.select import Selection
from xkv_service.factors import PrefixFactors
from xkv_service.reconstruct import rebuild
from xkv_service.selection import sketch
from xkv_service.selection.spec import Granularity

TOKENS, LAYER, HEADS, GROUP, DIM = 61, 1, 2, 2, 16
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def _factors(index: str, tokens: int = TOKENS) -> PrefixFactors:
    spec = CompressionSpec(
        group_size=3, rank_k=20, rank_v=24, index=index, landmark_chunk=4, sketch_planes=5, sink=3, recent=2
    )
    return compress(tiny_model("llama"), random_ids(tokens), spec)


@pytest.fixture(scope="module")
def sketched() -> PrefixFactors:
    return _factors("sketch")


@pytest.fixture(scope="module")
def marked() -> PrefixFactors:
    return _factors("landmark")


def _selection(factors: PrefixFactors, spec: SelectionSpec, tokens: int | None = None) -> Selection:
    return Selection(Prefix.of(_MODEL, factors, tokens).layers[LAYER], spec)


_MODEL = tiny_model("llama")


def _states(
    count: int, tail: int, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, tail keys and values, and a causal mask with a padding token in the second row."""
    make = torch.Generator().manual_seed(count * 100 + tail)
    query = 2 * torch.randn(batch, HEADS * GROUP, count, DIM, generator=make)
    keys = torch.randn(batch, HEADS, tail, DIM, generator=make)
    values = torch.randn(batch, HEADS, tail, DIM, generator=make)
    mask = torch.ones(count, TOKENS + tail, dtype=torch.bool).tril(TOKENS + tail - count)
    mask = mask[None, None].repeat(batch, 1, 1, 1)
    mask[-1, :, :, TOKENS] = False
    return query, keys, values, mask


def _scores(factors: PrefixFactors, query: torch.Tensor) -> torch.Tensor:
    """[query_heads, units] by the plain reference of the index, for one query token [query_heads, D]."""
    if LAYER in factors.sketches:
        return sketch.scores(query[None], factors.sketches[LAYER])[0]
    means = factors.landmarks[LAYER].float().repeat_interleave(GROUP, 1)
    return torch.einsum("hd,chd->hc", query, means)


def _reference(
    factors: PrefixFactors,
    spec: SelectionSpec,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scoring: Scoring,
) -> torch.Tensor:
    query, tail_keys, tail_values, mask = states
    keys, values = rebuild(factors, LAYER)
    table = factors.rotary[factors.groups[0].layout.rotary[LAYER]]
    keys = table.rotate(keys, torch.arange(TOKENS))
    out = torch.empty(query.shape[0], query.shape[2], HEADS * GROUP, DIM)
    for row in range(query.shape[0]):
        every_key = torch.cat([keys, tail_keys[row].transpose(0, 1)])
        every_value = torch.cat([values, tail_values[row].transpose(0, 1)])
        for step in range(query.shape[2]):
            visible = _chosen(factors, spec, query[row, :, step], every_key, mask[row, 0, step], scoring)
            for head in range(HEADS * GROUP):
                kv = head // GROUP
                scores = scoring(every_key[:, kv] @ query[row, head, step])[visible[kv]]
                if scoring.sinks is not None:
                    scores = torch.cat([scores, scoring.sinks[head : head + 1]])
                weights = scores.softmax(0)[: int(visible[kv].sum())]
                out[row, step, head] = weights @ every_value[visible[kv], kv]
    return out


def _chosen(
    factors: PrefixFactors,
    spec: SelectionSpec,
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """bool [kv_heads, TOKENS + tail]: what each KV head of one query token sees."""
    exact = factors.exact[LAYER].positions.long()
    visible = mask.repeat(HEADS, 1)
    if spec.selector == "dense":
        return visible
    unit = 1 if LAYER in factors.sketches else factors.spec.landmark_chunk
    scores = scoring(_scores(factors, query))
    others = torch.cat([exact, torch.arange(TOKENS, len(keys))])
    others = others[mask[others]]
    share = torch.empty(HEADS, scores.shape[1])
    for kv in range(HEADS):
        best = []
        for head in range(kv * GROUP, (kv + 1) * GROUP):
            known = scoring(keys[others, kv] @ query[head])
            if scoring.sinks is not None:
                known = torch.cat([known, scoring.sinks[head : head + 1]])
            best.append(scores[head] - torch.cat([scores[head], known]).logsumexp(0))
        share[kv] = torch.stack(best).amax(0)
    if spec.granularity == "layer":
        share = share.amax(0, keepdim=True).expand(HEADS, -1)
    positions = torch.arange(TOKENS)
    always = (positions < spec.sink) | (positions >= min(TOKENS - spec.recent, TOKENS // unit * unit))
    closed = always.clone()
    closed[exact] = True
    picked = torch.zeros(HEADS, TOKENS, dtype=torch.bool)
    for kv in range(HEADS):
        candidates = share[kv].clone()
        if unit == 1:
            candidates[closed] = -torch.inf
        units = candidates.topk(spec.tokens(TOKENS) // unit).indices
        tokens = (units[:, None] * unit + torch.arange(unit)).flatten()
        picked[kv, tokens[tokens < TOKENS]] = True
    picked |= always
    picked[:, exact] = True
    visible[:, :TOKENS] &= picked
    return visible


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("index", ["sketch", "landmark"])
@pytest.mark.parametrize("count", [1, 4])
def test_attention_equals_the_slow_reference(
    sketched: PrefixFactors, marked: PrefixFactors, index: str, granularity: Granularity, count: int
) -> None:
    factors = sketched if index == "sketch" else marked
    states = _states(count, tail=count + 3)
    for scoring in (Scoring(0.25), Scoring(0.4, softcap=5.0), Scoring(0.25, sinks=SINKS)):
        for spec in (
            SelectionSpec(budget=8, granularity=granularity, recent=0),
            SelectionSpec(budget=8, granularity=granularity, sink=6, recent=7),
            SelectionSpec("dense"),
        ):
            out, rebuilt = attend(*states, _selection(factors, spec), scoring)
            expected = _reference(factors, spec, states, scoring)
            torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
            assert 8 <= rebuilt <= TOKENS


def test_an_additive_mask_means_the_same(sketched: PrefixFactors) -> None:
    query, keys, values, mask = _states(4, tail=7)
    added = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    selection = _selection(sketched, SelectionSpec(budget=8, recent=0))
    expected, _ = attend(query, keys, values, mask, selection, Scoring(0.25))
    found, _ = attend(query, keys, values, added, selection, Scoring(0.25))
    torch.testing.assert_close(found, expected)


def test_queries_in_pieces_give_the_same(sketched: PrefixFactors, monkeypatch: pytest.MonkeyPatch) -> None:
    states, selection = _states(9, tail=9), _selection(sketched, SelectionSpec(budget=8, recent=0))
    expected, _ = attend(*states, selection, Scoring(0.25))
    monkeypatch.setattr(module, "_PIECE", 1)
    found, _ = attend(*states, selection, Scoring(0.25))
    torch.testing.assert_close(found, expected)


def test_a_token_that_sees_nothing_gives_no_nan(sketched: PrefixFactors) -> None:
    query, keys, values, mask = _states(2, tail=2)
    mask[0, :, 0] = False
    out, _ = attend(
        query, keys, values, mask, _selection(sketched, SelectionSpec(budget=8, recent=0)), Scoring(0.25)
    )
    assert bool(out.isfinite().all())


def test_the_fast_sketch_scores_equal_the_reference(sketched: PrefixFactors) -> None:
    queries = torch.randn(7, HEADS * GROUP, DIM)
    rows = queries.reshape(7, HEADS, GROUP, DIM).permute(1, 2, 0, 3).reshape(HEADS, GROUP * 7, DIM)
    found = SketchScorer(sketched.sketches[LAYER])(rows).reshape(HEADS, GROUP, 7, -1)
    expected = sketch.scores(queries, sketched.sketches[LAYER]).reshape(7, HEADS, GROUP, -1)
    torch.testing.assert_close(found, expected.permute(1, 2, 0, 3), atol=1e-4, rtol=1e-4)


def test_a_shorter_prefix_is_the_artifact_of_its_first_tokens(sketched: PrefixFactors) -> None:
    """Its attention equals that over the whole prefix with the later tokens masked."""
    states, shorter = _states(3, tail=5), 40
    query, keys, values, mask = states
    hidden = mask.clone()
    hidden[..., shorter:TOKENS] = False
    whole = _selection(sketched, SelectionSpec("dense"))
    part = _selection(sketched, SelectionSpec("dense"), shorter)
    expected, _ = attend(query, keys, values, hidden, whole, Scoring(0.25))
    cut = torch.cat([mask[..., :shorter], mask[..., TOKENS:]], -1)
    found, rebuilt = attend(query, keys, values, cut, part, Scoring(0.25))
    torch.testing.assert_close(found, expected)
    assert rebuilt == shorter - 3


def test_landmarks_of_a_shorter_prefix_leave_no_token_behind(marked: PrefixFactors) -> None:
    """The last chunk's landmark speaks for tokens that are not there, so its tokens are always taken."""
    selection = _selection(marked, SelectionSpec(budget=4, recent=0), 42)
    states = _states(1, tail=2, batch=1)
    attend(*states[:3], None, selection, Scoring(0.25))
    chosen = selection(
        states[0].reshape(1, HEADS, GROUP, 1, DIM), torch.zeros(1, HEADS, GROUP, 1), Scoring(0.25)
    )
    assert {40, 41} <= set(chosen.positions.tolist())
    assert max(chosen.positions.tolist()) < 42
