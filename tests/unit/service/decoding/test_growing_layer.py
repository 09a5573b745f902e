"""A layer that grows in place holds what Transformers' own does, and forks do not disturb each other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from xkv_service.decoding.growing_layer import GrowingLayer


def _states(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, tokens, 4, generator=generator), torch.randn(
        1, 2, tokens, 3, generator=generator
    )


_STEPS = st.lists(
    st.tuples(st.sampled_from(["grow", "crop", "fork"]), st.integers(0, 3), st.integers(1, 90)), max_size=25
)


@settings(deadline=None)
@given(_STEPS)
def test_any_history_of_forks_is_as_of_plain_layers(steps: list[tuple[str, int, int]]) -> None:
    import copy

    pairs = [(GrowingLayer(), DynamicLayer())]
    for seed, (step, which, size) in enumerate(steps):
        mine, plain = pairs[which % len(pairs)]
        if step == "grow":
            states = _states(seed, size)
            found, expected = mine.update(*states), plain.update(*states)
            assert all(map(torch.equal, found, expected))
        elif step == "crop" and plain.get_seq_length() > size:
            mine.crop(-size)
            plain.crop(-size)
        elif step == "fork" and len(pairs) < 6:
            pairs.append((copy.copy(mine), copy.copy(plain)))
        for left, right in pairs:
            assert left.get_seq_length() == right.get_seq_length()
            if right.get_seq_length():
                assert torch.equal(left.keys, right.keys)
                assert torch.equal(left.values, right.values)


def test_appending_one_token_at_a_time_copies_seldom() -> None:
    layer, places = GrowingLayer(), set()
    for step in range(1000):
        keys, _ = layer.update(*_states(step, 1))
        places.add(keys.data_ptr())
    assert len(places) < 20
    assert layer.nbytes <= 1.3 * (layer.keys.nbytes + layer.values.nbytes)


def test_gradients_flow_through_everything_that_was_appended() -> None:
    layer, first, second = GrowingLayer(), *_states(0, 4)
    first.requires_grad_()
    layer.update(first, second)
    keys, _ = layer.update(first, second)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.full_like(first, 2.0))
