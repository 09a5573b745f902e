"""Finding, identifying and loading models on disk; everything wrong with one is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from families import build, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from xkv_service.errors import DeviceUnavailable, InvalidSpec, ModelNotFound
from xkv_service.modeling.model_files import identity_of
from xkv_service.modeling.models import (
    context_window,
    find_model,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of tied embeddings in many shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sharded"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder, max_shard_size="40KB")
    words = {"<unk>": 0, "yes": 1, "no": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def refusal(path: Path | str, **options: Any) -> ModelNotFound:
    with pytest.raises(ModelNotFound) as refused:
        load_model(path, **options)
    assert "\n" not in refused.value.message
    assert refused.value.hint
    return refused.value


def test_a_sharded_model_comes_back_whole(saved: Path) -> None:
    assert len(list(saved.glob("*.safetensors"))) > 2
    loaded = load_model(saved, device="cpu")
    expected = tiny_model("llama", tie_word_embeddings=True)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("yes").input_ids == [1]
    assert loaded.context_window == 512


def test_identity_without_loading_is_the_loaded_models(saved: Path) -> None:
    identity = find_model(saved, device="cpu").identity
    assert identity == load_model(saved, device="cpu").identity
    assert (identity.name, identity.architecture) == ("tiny-sharded", "LlamaForCausalLM")
    assert identity.dtype == "float32"


def test_identity_does_not_depend_on_place_but_on_weights_and_dtype(saved: Path, broken: Path) -> None:
    fingerprint = find_model(saved).identity.fingerprint
    assert find_model(broken).identity.fingerprint == fingerprint
    assert find_model(saved, dtype="bfloat16").identity.fingerprint != fingerprint
    shard = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})
    assert find_model(broken).identity.fingerprint != fingerprint


def test_layout_and_tokenizer_need_no_weights(broken: Path) -> None:
    for shard in broken.glob("*.safetensors"):
        shard.write_bytes(b"")
    files = find_model(broken, device="cpu")
    assert [layer.kv_heads for layer in files.layout.layers] == [2, 2, 2]
    assert load_tokenizer(broken)("no").input_ids == [2]


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = refusal("some-org/some-model-that-is-not-here")
    assert "some-org/some-model-that-is-not-here" in error.message
    assert "hub cannot be reached" in error.message
    refusal("some-org/some-model-that-is-not-here", revision="abcdef")


def test_a_folder_has_no_revisions(saved: Path) -> None:
    error = refusal(saved, revision="v2")
    assert error.message == f"model {saved} has no revision 'v2': a folder has no revisions"


def test_a_model_from_the_hubs_cache_is_known_by_its_files(saved: Path, tmp_path: Path) -> None:
    """Some versions of Transformers note the commit, though it was loaded from a folder."""
    folder = shutil.copytree(saved, tmp_path / "snapshots" / ("0a" * 20))
    loaded = load_model(folder, device="cpu")
    loaded.model.config._commit_hash = folder.name
    found = identity_of(loaded.model)
    assert found is not None and found.fingerprint == loaded.identity.fingerprint


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a b c", "", "~/no-such-folder"])
def test_names_that_are_no_models(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refusal(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path).message


def test_pickled_weights_are_refused(broken: Path) -> None:
    for shard in broken.glob("*.safetensors*"):
        shard.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "pickled weights only" in refusal(broken).message


def test_a_truncated_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:200])
    refusal(broken)


def test_a_missing_shard(broken: Path) -> None:
    sorted(broken.glob("*.safetensors"))[1].unlink()
    refusal(broken)


def test_weights_that_are_not_all_there(broken: Path) -> None:
    """Transformers would fill them with random numbers."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    error = refusal(broken)
    assert "lacks" in error.message
    assert "layers.3" in error.message


def test_weights_of_another_shape(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refusal(broken)


def test_remote_code_is_never_run(broken: Path) -> None:
    (broken / "evil.py").write_text("raise SystemExit('remote code ran')")
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"},
    }
    (broken / "config.json").write_text(json.dumps(config))
    refusal(broken)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-type"}', '{"model_type": "t5"}'])
def test_configs_that_are_none(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refusal(broken)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": -5}, "hidden size"),
        ({"hidden_size": 0}, "config.json says hidden_size=0"),
        ({"num_hidden_layers": -1}, "config.json says num_hidden_layers=-1"),
        ({"num_hidden_layers": 10**9}, "config.json says num_hidden_layers=1000000000"),
        ({"num_hidden_layers": "many"}, "expected int"),
        ({"hidden_size": "wide"}, "expected int"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"num_key_value_heads": 0}, "by zero"),
        ({"vocab_size": -1}, "config.json says vocab_size=-1"),
        ({"vocab_size": 0}, "config.json says vocab_size=0"),
        ({"layer_types": ["none"]}, "layer_types"),
    ],
)
def test_configs_with_impossible_fields(broken: Path, fields: dict[str, Any], reason: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelNotFound, match=reason) as refused:
        _ = find_model(broken).layout
    assert refused.value.hint


def test_a_broken_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(broken).message


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "mute")
    assert "no tokenizer" in refusal(tmp_path / "mute").message


def test_unknown_dtypes_and_devices(saved: Path) -> None:
    with pytest.raises(InvalidSpec, match="dtype='int3'"):
        find_model(saved, dtype="int3")
    for device in ("cuda:99", "tpu", "mps", "nonsense"):
        with pytest.raises(DeviceUnavailable):
            find_model(saved, device=device)


def test_automatic_dtype() -> None:
    config = AutoConfig.for_model("llama", dtype="float16")
    assert resolve_dtype(config, "auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype(config, "auto", torch.device("cuda")) == torch.float16
    assert resolve_dtype(AutoConfig.for_model("llama"), "auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype(config, "bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("model_type", "fields", "window"),
    [
        ("llama", {"max_position_embeddings": 777}, 777),
        ("gpt2", {"n_positions": 55}, 55),
        ("bloom", {}, None),
        ("mamba", {}, None),
    ],
)
def test_context_window(model_type: str, fields: dict[str, Any], window: int | None) -> None:
    assert context_window(AutoConfig.for_model(model_type, **fields)) == window
