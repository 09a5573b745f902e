"""Caches from stored artifacts: the right model, a shorter prefix, and only the ranks that are asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.engine.storages import held_bytes
from xkv_service.errors import InvalidSpec, ModelMismatch
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import find_model

TOKENS = 160
SPEC = CompressionSpec(group_size=3, rank_k=90, rank_v=96, factor_dtype="float32", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def factors(loaded: PreTrainedModel) -> PrefixFactors:
    return compress(loaded, random_ids(TOKENS), SPEC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


def _publish(store: ArtifactStore, factors: PrefixFactors, identity: ModelIdentity) -> str:
    fields = manifest_of(factors).model_dump()
    ids = factors.token_ids.tolist()
    fields |= {"model": identity, "id": artifact_id(identity.fingerprint, "default", ids, fields["spec"])}
    return store.publish(PrefixManifest(**fields), factors.to_tensors()).id


def _logits(model: PreTrainedModel, cache: XKVCache) -> torch.Tensor:
    with torch.no_grad(), enable_xkv(model):
        logits: torch.Tensor = model(random_ids(5, seed=3)[None], past_key_values=cache).logits
    return logits


def test_an_artifact_gives_what_its_factors_give(
    store: ArtifactStore, loaded: PreTrainedModel, folder: Path, factors: PrefixFactors
) -> None:
    found = _publish(store, factors, find_model(folder, device="cpu").identity)
    cache = XKVCache.from_artifact(loaded, store, found)
    assert torch.equal(_logits(loaded, cache), _logits(loaded, XKVCache.from_factors(loaded, factors)))


def test_the_dtype_may_differ_but_not_the_files(
    store: ArtifactStore, loaded: PreTrainedModel, folder: Path, factors: PrefixFactors
) -> None:
    half = _publish(store, factors, find_model(folder, device="cpu", dtype="bfloat16").identity)
    XKVCache.from_artifact(loaded, store, half)
    other = find_model(folder, device="cpu").identity.model_copy(update={"fingerprint": "5" * 64})
    with pytest.raises(ModelMismatch, match="other files"):
        XKVCache.from_artifact(loaded, store, _publish(store, factors, other))


def test_only_the_leading_blocks_are_read(
    store: ArtifactStore,
    loaded: PreTrainedModel,
    folder: Path,
    factors: PrefixFactors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _publish(store, factors, find_model(folder, device="cpu").identity)
    read: dict[str, int] = {}
    real = store.load

    def load(artifact: str, names: Any = None, **options: Any) -> Any:
        manifest, tensors = real(artifact, names, **options)
        read.update({name: tensor.nbytes for name, tensor in tensors.items()})
        return manifest, tensors

    monkeypatch.setattr(store, "load", load)
    XKVCache.from_artifact(loaded, store, found)
    everything = sum(read.values())
    read.clear()
    cache = XKVCache.from_artifact(loaded, store, found, rank_k=20, rank_v=64)
    assert sum(read.values()) == everything - 4 * (TOKENS * (26 + 32) + (26 + 32) * 96)
    assert "group.0.key.factors.1" not in read and "group.0.value.bases.1" not in read
    group = factors.groups[0]
    expected = group.keys.factors[7, :20] @ group.keys.layer_bases(0)[:20]
    layer = cache.prefix.layers[0]
    place = torch.tensor([7])
    unrotated = factors.rotary[0].unrotate(layer.keys(place), place).flatten()
    torch.testing.assert_close(unrotated, expected, atol=1e-5, rtol=1e-5)


def test_every_rank_read_in_part_is_the_whole(
    store: ArtifactStore, loaded: PreTrainedModel, folder: Path, factors: PrefixFactors
) -> None:
    found = _publish(store, factors, find_model(folder, device="cpu").identity)
    whole = _logits(loaded, XKVCache.from_artifact(loaded, store, found))
    asked = XKVCache.from_artifact(loaded, store, found, rank_k=500, rank_v=96)
    assert torch.equal(_logits(loaded, asked), whole)
    for rank in (0, 1.5, True, "full"):
        with pytest.raises(InvalidSpec, match=f"rank_k={rank!r}"):
            XKVCache.from_artifact(loaded, store, found, rank_k=rank)  # type: ignore[arg-type]


def test_a_shorter_prefix_answers_as_its_own_factors_would(loaded: PreTrainedModel) -> None:
    full = CompressionSpec(rank_k="full", rank_v="full", factor_dtype="float32", dtype="float32")
    long = compress(loaded, random_ids(TOKENS), full)
    short = compress(loaded, random_ids(TOKENS)[:100], full)
    dense = SelectionSpec("dense")
    part = XKVCache.from_factors(loaded, long, dense, tokens=100)
    assert part.get_seq_length() == 100
    own = XKVCache.from_factors(loaded, short, dense)
    torch.testing.assert_close(_logits(loaded, part), _logits(loaded, own), atol=1e-4, rtol=1e-4)


def test_a_prefix_so_short_that_all_of_it_is_exact(loaded: PreTrainedModel, factors: PrefixFactors) -> None:
    """Nothing is left to rebuild."""
    exact = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(random_ids(TOKENS)[None, :2], past_key_values=exact)
        expected = loaded(random_ids(5, seed=3)[None], past_key_values=exact).logits
    found = _logits(loaded, XKVCache.from_factors(loaded, factors, tokens=2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_sessions_of_one_prefix_share_its_memory(loaded: PreTrainedModel, factors: PrefixFactors) -> None:
    first, second = (XKVCache.from_factors(loaded, factors) for _ in range(2))
    assert first.prefix is second.prefix
    stored = factors.groups[0].keys.factors
    assert first.prefix.layers[0]._key_factors.data_ptr() == stored.data_ptr()


def test_sessions_of_one_prefix_share_what_they_choose_from(
    loaded: PreTrainedModel, factors: PrefixFactors
) -> None:
    """It is made when PyTorch chooses; kernels have a table of their own."""
    spec = SelectionSpec(budget=30, recent=8)
    first, second = (XKVCache.from_factors(loaded, factors, spec) for _ in range(2))
    ours, theirs = ([layer.selection for layer in cache.layers] for cache in (first, second))
    assert not any(selection.dense for selection in ours)
    assert held_bytes(*ours, device=loaded.device, besides=first.prefix) < TOKENS * len(ours)
    assert torch.equal(_logits(loaded, first), _logits(loaded, second))
    assert held_bytes(*theirs, device=loaded.device, besides=[first.prefix, *ours]) == 0
    assert 0 < held_bytes(*ours, device=loaded.device, besides=first.prefix) <= 2 * TOKENS * len(ours)


def test_an_artifact_file_can_be_used_without_a_store(factors: PrefixFactors) -> None:
    from xkv_artifacts.format import read_prefix, write_prefix

    file = io.BytesIO()
    write_prefix(file, manifest_of(factors), factors.to_tensors())
    file.seek(0)
    again = PrefixFactors.from_tensors(*read_prefix(file))
    assert again.tokens == TOKENS
