"""A prefix loaded to a GPU is the one that was stored, layer by layer. Run with `pytest -m gpu` on a GPU."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from families import tiny_model
from plain_store import PlainStore

from tests.artifact_samples import FINGERPRINT
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity, PrefixManifest
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.artifact_parts import part_names
from xkv_service.decoding.arriving import Arriving, ArrivingCache, NotArriving
from xkv_service.decoding.device_landing import DeviceLanding
from xkv_service.decoding.loading import load_parts
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.prefix_loading import PrefixLoading
from xkv_service.factors import PrefixFactors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 400
SELECTION = SelectionSpec(budget=64)
SPECS = {
    "stored index": CompressionSpec(group_size=2, rank_k=24, rank_v=40, outlier_chunks=2),
    "derived index": CompressionSpec(group_size=2, rank_k=24, rank_v=40, index="derived"),
    "landmarks": CompressionSpec(
        group_size=2, rank_k=24, rank_v=40, index="landmark", factor_dtype="bfloat16"
    ),
}


@pytest.fixture(params=["llama", "gemma3", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param).to("cuda")


def publish(store: PlainStore, factors: PrefixFactors) -> str:
    fields = factors.manifest_fields()
    name = artifact_id(FINGERPRINT, "default", factors.token_ids.tolist(), fields["spec"])
    manifest = PrefixManifest(
        id=name,
        model=ModelIdentity(fingerprint=FINGERPRINT, name="tiny", architecture="Tiny", dtype="float32"),
        namespace="default",
        document=DocumentRef(uri="corpus/a.txt", sha256="d" * 64),
        created="2026-11-22T08:00:00Z",
        **fields,
    )
    store.publish(manifest, factors.to_tensors())
    return name


def logits(model: PreTrainedModel, cache: XKVCache) -> torch.Tensor:
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        found: torch.Tensor = model(ids, past_key_values=cache).logits
    return found


@pytest.mark.parametrize("kind", list(SPECS))
def test_a_loaded_prefix_answers_as_the_factors_it_was_made_of(
    model: PreTrainedModel, kind: str, tmp_path: Path
) -> None:
    ids = torch.randint(3, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))
    factors = compress(model, ids, SPECS[kind])
    store = PlainStore(tmp_path)
    name = publish(store, factors)
    loading = PrefixLoading(model, cast(Any, store), SELECTION, None)
    with enable_xkv(model):
        head, *parts = load_parts(cast(Any, store), store.manifest(name), None)
        expected = logits(model, XKVCache(Prefix.of(model, head.joined(parts)), SELECTION))
        for _ in range(3):  # the later ones in memory that was used before
            started: list[threading.Thread] = []
            beside: list[torch.Tensor] = []

            def begin(
                arriving: Arriving, beside: list[torch.Tensor] = beside, to: list[threading.Thread] = started
            ) -> None:
                # On another stream than the load's: it waits on the device for what it reads.
                def run() -> None:
                    with torch.cuda.stream(torch.cuda.Stream()):
                        cache = ArrivingCache(arriving, SELECTION, threading.Event())
                        beside.append(logits(model, cache))
                        torch.cuda.current_stream().synchronize()

                to.append(threading.Thread(target=run))
                to[0].start()

            bound = loading.bind(loading.announce(name), None, begin)
            started[0].join(60)
            for found in (beside[0], logits(model, XKVCache(bound, SELECTION))):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_lands_is_what_was_stored(tmp_path: Path) -> None:
    model = tiny_model("llama").to("cuda")
    factors = compress(model, torch.randint(3, 96, (TOKENS,)), SPECS["stored index"])
    store = PlainStore(tmp_path)
    name = publish(store, factors)
    landing = DeviceLanding(torch.device("cuda"))
    names = part_names(store.manifest(name))
    found = {key: one for part in store.load_parts(name, names, landing) for key, one in part.items()}
    landing.join()
    stored = factors.to_tensors()
    assert found.keys() == stored.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor.cpu(), stored[key])
    assert {one.device.type for key, one in found.items() if key.startswith("group.0.key.f")} == {"cuda"}
    assert not found["tokens"].is_cuda


def test_a_damaged_blob_is_refused_and_ends_the_forward_beside_it(tmp_path: Path) -> None:
    model = tiny_model("llama").to("cuda")
    store = PlainStore(tmp_path)
    name = publish(store, compress(model, torch.randint(3, 96, (TOKENS,)), SPECS["stored index"]))
    announced = PrefixLoading(model, cast(Any, store), SELECTION, None).announce(name)
    with store.path(name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    ended: list[BaseException] = []

    def begin(arriving: Arriving) -> None:
        def run() -> None:
            try:
                logits(model, ArrivingCache(arriving, SELECTION, threading.Event()))
            except NotArriving as error:
                ended.append(error)

        threads.append(threading.Thread(target=run))
        threads[0].start()

    threads: list[threading.Thread] = []
    with enable_xkv(model):
        with pytest.raises(CorruptArtifact):
            PrefixLoading(model, cast(Any, store), SELECTION, None).bind(announced, None, begin)
        threads[0].join(60)  # it reads the cache for as long as it runs
    assert ended
