"""The training forward pass against Transformers' own, and what the scores count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from demo_training.network import Network, build_model
from demo_training.scores import Scores, right_answers
from demo_training.training import weighted_loss
from torch.nn import functional
from transformers import LlamaConfig


def _small_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
    )


def test_losses_equal_those_of_transformers(demo_model: Any) -> None:
    small = build_model(_small_config(), seed=0)
    for model, vocabulary in ((small, 300), (demo_model, 2048)):
        ids = torch.randint(6, vocabulary, (2, 120), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
            losses, right = Network(model, compiled=False)(ids)
        wanted = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        difference = (losses[:, :-1].flatten() - wanted).abs().max()
        print(f"largest difference of a loss: {difference:.2e}")
        assert difference < 2e-4
        assert torch.equal(right[:, :-1], logits.argmax(-1) == ids[:, 1:])


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    answers = torch.tensor([[0, 0, 1, 1, 0, 2, 2]])
    kinds = torch.tensor([[1, 2, -1]], dtype=torch.int8)
    right = torch.tensor([[True, True, True, True, True, False, True]])
    assert right_answers(right, answers, kinds).tolist() == [[True, False, False]]
    scores = Scores(torch.device("cpu"))
    scores.add(right, answers, kinds)
    assert scores.by_kind() == {"fact": (1, 1.0), "chain": (1, 0.0)}
    assert scores.token_accuracy() == 0.75


def test_the_loss_weighs_answers_ten_times_the_rest() -> None:
    ids = torch.tensor([[5, 5, 5, 5, 0, 0]])
    answers = torch.tensor([[0, 0, 1, 1, 0, 0]])
    losses = torch.tensor([[4.0, 1.0, 3.0, 100.0, 100.0, 100.0]])
    assert weighted_loss(losses, ids, answers).item() == pytest.approx(2.0 + 0.1 * 4.0)
