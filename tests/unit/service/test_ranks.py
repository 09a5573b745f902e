"""Byte accounting and ranks from a target ratio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_artifacts.manifest import StateLayout, StateShape
from xkv_service.errors import InvalidSpec, RatioUnreachable
from xkv_service.factorization.ranks import RotaryUse, Size, size_of
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.spec import CompressionSpec


def layout(layers: int = 32, heads: int = 8, dim: int = 128, *, sliding: int = 0) -> ModelLayout:
    full = LayerLayout(0, "full", heads, 4 * heads, dim, dim)
    window = replace(full, kind="sliding", window=100)
    return ModelLayout(tuple(replace(window if i < sliding else full, index=i) for i in range(layers)))


def stored_with_more_ranks(layout: ModelLayout, tokens: int, spec: CompressionSpec, size: Size) -> int:
    """Bytes with the next larger ranks in every group: multiples of 8, as all large ranks are."""
    group = size.groups[0]
    changed = replace(spec, ratio=None, rank_k=group.rank_k + 8, rank_v=group.rank_v + 8)
    return size_of(layout, tokens, changed).bytes_stored


def latents(layers: int = 32) -> ModelLayout:
    """DeepSeek's: 512 dimensions of latent and 64 of rotated key, for 128 heads."""
    return ModelLayout(tuple(LayerLayout(i, "latent", 1, 128, 512, 64) for i in range(layers)))


@pytest.mark.parametrize("ratio", [2.0, 4.0, 6.0])
def test_latents_get_the_whole_budget_of_factors_and_are_counted_as_cached(ratio: float) -> None:
    size = size_of(latents(), 65536, CompressionSpec(ratio=ratio))
    assert size.bytes_full == 65536 * 32 * (512 + 64) * 2
    assert size.bytes_stored <= size.bytes_full / ratio
    assert {group.rank_v for group in size.groups} == {0}
    more = CompressionSpec(rank_k=size.groups[0].rank_k + 8, rank_v=1)
    assert size_of(latents(), 65536, more).bytes_stored > size.bytes_full / ratio


def test_exact_rotated_keys_bound_the_ratio_of_latents() -> None:
    """64 of 576 numbers stay as they are: 9x at most."""
    with pytest.raises(RatioUnreachable, match="what stays exact it is 8[.][0-9]+x at most"):
        size_of(latents(), 65536, CompressionSpec(ratio=9))


def test_an_index_that_latents_do_not_have_costs_nothing() -> None:
    sizes = {
        size_of(latents(), 65536, CompressionSpec(ratio=4, index=index)).bytes_stored
        for index in ("sketch", "landmark", "none")
    }
    assert len(sizes) == 1


def test_states_are_counted_on_both_sides() -> None:
    shape = StateShape(shape=(1000, 1000), dtype="float32")
    state = StateLayout(layer=2, conv=(), recurrent=(shape,))
    full = layout(2)
    linear = LayerLayout(2, "linear", 0, 0, 0, 0, state=state)
    spec = CompressionSpec(rank_k=8, rank_v=8)
    plain = size_of(full, 4096, spec)
    hybrid = size_of(ModelLayout((*full.layers, linear)), 4096, spec)
    assert hybrid.bytes_full - plain.bytes_full == 4_000_000
    assert hybrid.bytes_tensors - plain.bytes_tensors == 4_000_000
    assert hybrid.states == (state,)


@pytest.mark.parametrize("ratio", [3.0, 4.0, 8.0, 12.0])
@pytest.mark.parametrize("index", ["sketch", "landmark", "none"])
def test_the_ratio_is_reached_with_everything_counted_and_no_rank_is_wasted(ratio: float, index: Any) -> None:
    spec = CompressionSpec(ratio=ratio, index=index)
    size = size_of(layout(), 65536, spec)
    assert size.bytes_full == 65536 * 131072
    assert size.bytes_stored <= size.bytes_full / ratio
    assert stored_with_more_ranks(layout(), 65536, spec, size) > size.bytes_full / ratio


def test_llama_8b_at_eight_times_has_about_the_papers_ranks() -> None:
    group = size_of(layout(), 131072, CompressionSpec(ratio=8, index="none", factor_dtype="bfloat16")).groups[
        0
    ]
    assert (group.rank_k, group.rank_v) == (pytest.approx(384, abs=40), pytest.approx(576, abs=60))


def test_large_ranks_are_multiples_of_eight_and_small_ones_use_every_byte() -> None:
    large = size_of(layout(), 65536, CompressionSpec(ratio=8)).groups[0]
    assert large.rank_k % 8 == large.rank_v % 8 == 0
    small = {
        size_of(layout(8, 3, 64), 4096, CompressionSpec(ratio=ratio)).groups[0].rank_v
        for ratio in (7.8, 8, 8.2)
    }
    assert len(small) == 3


def test_keys_and_values_share_the_budget_as_asked() -> None:
    group = size_of(layout(), 65536, CompressionSpec(ratio=8, key_share=0.25)).groups[0]
    assert group.rank_k / (group.rank_k + group.rank_v) == pytest.approx(0.25, abs=0.01)


def test_what_keys_cannot_use_goes_to_values() -> None:
    group = size_of(layout(4), 65536, CompressionSpec(ratio=1.2, key_share=0.9, index="none")).groups[0]
    assert group.rank_k == 4096
    assert group.rank_v > 1000


def test_ranks_never_pass_tokens_or_features() -> None:
    size = size_of(layout(), 300, CompressionSpec(rank_k="full", rank_v="full"))
    assert {(group.rank_k, group.rank_v) for group in size.groups} == {(300, 300)}


def test_a_last_group_of_fewer_layers_gets_as_many_fewer_ranks() -> None:
    first, last = size_of(layout(6), 65536, CompressionSpec(ratio=8)).groups
    assert (first.layers, last.layers) == ((0, 1, 2, 3), (4, 5))
    assert last.rank_k + last.rank_v == pytest.approx((first.rank_k + first.rank_v) / 2, abs=8)
    ranks = CompressionSpec(rank_k=3000, rank_v=3000)
    assert size_of(layout(6), 65536, ranks).groups[1].rank_k == 2048


def test_a_rank_larger_than_the_matrix_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="rank_v=301"):
        size_of(layout(), 300, CompressionSpec(rank_k=300, rank_v=301))


def test_an_unreachable_ratio_says_why() -> None:
    with pytest.raises(RatioUnreachable, match="ratio=100 cannot be reached for 500 tokens"):
        size_of(layout(), 500, CompressionSpec(ratio=100))


@pytest.mark.parametrize("ratio", [1, 8])
def test_too_few_tokens_are_told_whatever_the_ratio(ratio: float) -> None:
    with pytest.raises(
        RatioUnreachable, match="3 tokens are too few for any ratio: .* times the bytes of their exact cache"
    ) as caught:
        size_of(layout(), 3, CompressionSpec(ratio=ratio))
    assert "ratio" not in caught.value.hint


def test_sliding_layers_are_counted_exact() -> None:
    model = layout(8, sliding=4)
    size = size_of(model, 4096, CompressionSpec(ratio=4))
    assert [window.layer for window in size.windows] == [0, 1, 2, 3]
    assert {window.tokens for window in size.windows} == {100}
    assert size.bytes_full == model.bytes_full(4096)
    assert size.bytes_tensors > 4 * 100 * 2048 * 2


def test_large_rotary_tables_are_paid_for_with_ranks() -> None:
    small = size_of(layout(), 8192, CompressionSpec(ratio=8))
    use = RotaryUse(dict.fromkeys(range(32), 0), 2**22, 4)
    large = size_of(layout(), 8192, CompressionSpec(ratio=8), use)
    assert large.groups[0].rank_v < small.groups[0].rank_v
    assert large.bytes_stored <= large.bytes_full / 8


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(64, 20000),
    layers=st.integers(1, 9),
    heads=st.integers(1, 4),
    group_size=st.integers(1, 5),
    ratio=st.floats(1.0, 12.0),
    key_share=st.floats(0.05, 0.95),
)
def test_any_reachable_ratio_is_kept(
    tokens: int, layers: int, heads: int, group_size: int, ratio: float, key_share: float
) -> None:
    spec = CompressionSpec(group_size=group_size, ratio=ratio, key_share=key_share)
    try:
        size = size_of(layout(layers, heads, 32), tokens, spec)
    except RatioUnreachable:
        return
    assert size.ratio >= ratio
    for group in size.groups:
        assert 1 <= group.rank_k <= min(tokens, sum(group.key_widths))
        assert 1 <= group.rank_v <= min(tokens, sum(group.value_widths))
