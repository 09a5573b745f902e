"""MiniCache: directions merged on the sphere, magnitudes and the most different tokens kept."""

from __future__ import annotations

import math

import pytest
import torch
from prefixes import FAMILIES, TOKENS, check_prepared, exact_logits, exact_prefix, logits_on

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.minicache import MiniCache, merge, slerp
from xkv_service.evaluation.methods.registry import make_method


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_prefix_serves_a_chat(family: str) -> None:
    check_prepared(MiniCache(), family)


def test_two_right_angled_directions_by_hand() -> None:
    merged, angle = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.6)
    wanted = torch.tensor([[math.sin(0.4 * math.pi / 2), math.sin(0.6 * math.pi / 2)]])
    torch.testing.assert_close(merged, wanted)
    torch.testing.assert_close(angle, torch.tensor([math.pi / 2]))


def test_interpolated_directions_keep_their_length_and_split_the_angle() -> None:
    first, second = torch.nn.functional.normalize(torch.randn(2, 50, 24), dim=-1)
    merged, angle = slerp(first, second, 0.25)
    torch.testing.assert_close(merged.norm(dim=-1), torch.ones(50))
    torch.testing.assert_close(torch.arccos((merged * first).sum(-1)), angle / 4, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slerp(first, second, 0.0)[0], first)
    torch.testing.assert_close(slerp(first, first, 0.6)[0], first)


def test_a_merged_pair_by_hand() -> None:
    first = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 4.0], [1.0, 1.0], [0.0, 5.0]])
    pair = merge(first, second, 0.5, retained=1)
    assert pair.positions.tolist() == [0]  # 90 degrees apart; the others 45 and 0
    half = [math.cos(math.pi / 8), math.sin(math.pi / 8)]
    torch.testing.assert_close(pair.restore(0), torch.tensor([[3.0, 0.0], half, [0.0, 2.0]]))
    longer = [math.sqrt(2) * half[0], math.sqrt(2) * half[1]]
    torch.testing.assert_close(pair.restore(1), torch.tensor([[0.0, 4.0], longer, [0.0, 5.0]]))


def test_zero_states_survive() -> None:
    pair = merge(torch.zeros(3, 4), torch.ones(3, 4), 0.6, retained=0)
    assert torch.equal(pair.restore(0), torch.zeros(3, 4))
    assert pair.restore(1).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"gamma": 1.0, "start": 0}, {"start": 99}])
def test_keeping_every_token_is_exact(family: str, options: dict[str, float]) -> None:
    model, exact = exact_prefix(family)
    prepared = MiniCache(**options).prepare(model, exact)  # type: ignore[arg-type]
    torch.testing.assert_close(logits_on(model, prepared.cache()), exact_logits(model, exact))


def test_merging_changes_the_merged_layers_only() -> None:
    model, exact = exact_prefix()
    layers = MiniCache().prepare(model, exact).cache().layers
    same = [torch.equal(layers[i].keys[0].transpose(0, 1), exact.rotated_keys(i)) for i in range(6)]
    assert same == [True, True, True, False, False, True]


def test_bytes_are_counted_one_by_one() -> None:
    model, exact = exact_prefix()
    width, kept = 2 * 16, round(0.05 * TOKENS)
    # One direction, two magnitudes a token; per kept token two vectors and a position of 32 bits.
    side = 2 * (TOKENS * width + 2 * TOKENS + 2 * kept * width) + 4 * kept
    alone = 2 * 2 * TOKENS * width
    assert MiniCache().prepare(model, exact).nbytes == 2 * side + 4 * alone
    assert MiniCache(start=0).prepare(model, exact).nbytes == 3 * 2 * side
    full = exact.layout.bytes_full(TOKENS)
    assert 1.5 < full / MiniCache(start=0, gamma=0.05).prepare(model, exact).nbytes < 2


def test_options_come_from_a_text_and_are_checked() -> None:
    method = make_method("minicache:start=0,t=0.5,gamma=0.1")
    assert isinstance(method, MiniCache)
    assert (method.start, method.t, method.gamma) == (0, 0.5, 0.1)
    for bad in ("start=-1", "t=2", "gamma=-0.1", "gamma=nan"):
        with pytest.raises(InvalidSpec):
            make_method(f"minicache:{bad}")
