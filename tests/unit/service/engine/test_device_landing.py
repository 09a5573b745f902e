"""A prefix that several threads read, as for a GPU, is the one that one thread reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from published import prompt_logits, publish

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import device_landing
from xkv_service.decoding.device_landing import DeviceLanding
from xkv_service.decoding.loading import load_factors
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine import prefix_loading
from xkv_service.engine.prefix_loading import PrefixLoading


class Copied:
    """As `Copies`, without a device."""

    def __init__(self, device: torch.device) -> None:
        pass

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def join(self) -> None:
        pass


@pytest.fixture(autouse=True, params=[False, True], ids=["one by one", "together"])
def as_for_a_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_landing, "Copies", Copied)
    monkeypatch.setattr(
        DeviceLanding, "buffer", lambda self, place, nbytes: torch.empty(nbytes, dtype=torch.uint8)
    )
    monkeypatch.setattr(
        prefix_loading, "landing_for", lambda device, _: DeviceLanding(device, together=request.param)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("index", ["sketch", "derived", "landmark"])
def test_the_prefix_answers_as_its_factors(tmp_path: Path, family: str, index: str) -> None:
    model, selection = tiny_model(family), SelectionSpec(budget=32)
    spec = CompressionSpec(group_size=2, rank_k=24, rank_v=24, index=index, outlier_chunks=1)
    with ArtifactStore.open(str(tmp_path)) as store, enable_xkv(model):
        name = publish(store, compress(model, random_ids(150), spec))
        loading = PrefixLoading(model, store, selection, None)
        bound = loading.bind(loading.announce(name), None)
        plain = Prefix.of(model, load_factors(store, name))
        found, expected = (prompt_logits(model, XKVCache(one, selection)) for one in (bound, plain))
        assert torch.equal(found, expected)


def test_a_damaged_blob_is_put_away(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with ArtifactStore.open(str(tmp_path)) as store:
        name = publish(store, compress(model, random_ids(150), CompressionSpec(rank_k=24, rank_v=24)))
        loading = PrefixLoading(model, store, SelectionSpec(), None)
        announced = loading.announce(name)
        path = tmp_path / blob_name(name)
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        with pytest.raises(CorruptArtifact, match="quarantine"):
            loading.bind(announced, None)
        assert not store.blobs.exists(name)
