"""Settings out of range say so; sampling follows them."""

from __future__ import annotations

import pytest
import torch

from xkv_service.errors import InvalidSpec
from xkv_service.sessions.sampling import Sampler, choose
from xkv_service.sessions.settings import GenerationSettings


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": "text"},
        {"stop": ("",)},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec, match=next(iter(fields))):
        GenerationSettings(**fields)  # type: ignore[arg-type]


def _share(settings: GenerationSettings, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    sample = Sampler(settings)
    counts = torch.bincount(torch.tensor([sample(logits) for _ in range(draws)]), minlength=len(logits))
    return counts / draws


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(GenerationSettings())(torch.tensor([0.0, 2.0, 1.0])) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_come_as_often_as_the_logits_say(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    found = _share(GenerationSettings(temperature=temperature, seed=0), logits)
    torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.03, rtol=0)


def test_top_p_leaves_the_unlikely_out() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = _share(GenerationSettings(temperature=1.0, top_p=0.65, seed=0), logits)
    torch.testing.assert_close(found, torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]), atol=0.03, rtol=0)
    assert _share(GenerationSettings(temperature=1.0, top_p=1e-9, seed=0), logits, 50)[0] == 1


def test_a_sequence_draws_the_same_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3, 50)
    every = [
        GenerationSettings(temperature=0.9, top_p=0.7, seed=3), GenerationSettings(),
        GenerationSettings(temperature=1.5, seed=4),
    ]  # fmt: skip
    together, alone = ([Sampler(one) for one in every] for _ in range(2))
    for step in logits:
        assert choose(together, step) == [one(row) for one, row in zip(alone, step, strict=True)]


def test_logits_that_are_no_numbers_are_told_of_their_own_row_alone() -> None:
    logits = torch.tensor([[0.0, 2.0], [torch.nan, 0.0], [3.0, 1.0]])
    hot = GenerationSettings(temperature=1e-310, seed=0)
    found = choose([Sampler(GenerationSettings()), Sampler(hot), Sampler(hot)], logits)
    assert (found[0], found[2]) == (1, 0)
    with pytest.raises(ArithmeticError):
        Sampler(hot)(logits[1])
