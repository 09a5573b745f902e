"""A tiny training run: it passes its stages, resumes where it was stopped, and exports what loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_training.network import build_model
from demo_training.training import Settings, Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from xkv_service.demo import demo_model_path

STEPS = 10


def _trainer(folder: Path, **changes: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    values: dict[str, Any] = {
        "out": folder, "seed": 3, "rate": 1e-3, "steps": STEPS, "tokens_per_step": 512, "workers": 0,
        "report": 2, "gate_scale": 0.0, "save_seconds": 0.0, "compiled": False,
    }  # fmt: skip
    return Trainer(build_model(config, 3), tokenizer, Settings(**(values | changes)), torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from start to end."""
    folder = tmp_path_factory.mktemp("run")
    _trainer(folder).run()
    return folder


def test_every_stage_is_passed_when_gates_are_open(finished: Path) -> None:
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log] == ["copy", "short", "medium", "long", "mixed"]
    assert [line["step"] for line in log] == list(range(2, STEPS + 1, 2))


def test_a_closed_gate_holds_the_stage(tmp_path: Path) -> None:
    _trainer(tmp_path, gate_scale=1.0, steps=6).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {"copy"}


def test_a_stopped_run_resumes_to_the_same_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path)
    step = trainer._step

    def stopped_at_nine(batch: Any) -> torch.Tensor:
        if trainer.progress.step == 9:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(trainer, "_step", stopped_at_nine)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed = _trainer(tmp_path)
    assert resumed.progress.step == 8
    resumed.run()
    whole, pieces = (load_file(folder / "checkpoint.safetensors") for folder in (finished, tmp_path))
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_the_export_is_the_trained_model_in_bf16(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    trained = load_file(finished / "checkpoint.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[f"weight.{name}"].to(torch.bfloat16))
