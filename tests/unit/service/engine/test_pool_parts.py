"""Parts in a pool: right as the factors cut so, read alone, gone once the whole is there or found damaged."""

from __future__ import annotations

import io
import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import calibrated
from published import prompt_logits, publish
from test_prefix_pool import ROOM, until
from transformers import PreTrainedModel

from xkv_artifacts.errors import StoreError
from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.manifest import ModelIdentity, PartFidelity
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, enable_xkv
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.compression import compress_each
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine import parts
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.parts import artifact_of, is_part, part_offers, resident_key
from xkv_service.engine.prefix_loading import PrefixLoading
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.factors import PrefixFactors
from xkv_service.leading_part import leading_part

WIDE = {"num_key_value_heads": 4, "head_dim": 32, "hidden_size": 128}
SPEC = CompressionSpec(group_size=3, rank_k=200, rank_v=200)
TOKENS = 300
PATIENT = 30.0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", **WIDE)


@pytest.fixture(scope="module")
def factors(model: PreTrainedModel) -> PrefixFactors:
    return compress_each(model, random_ids(TOKENS), [SPEC], parts=True)[0]


class NotedFile(io.RawIOBase):
    """A file that notes which of its bytes are read."""

    def __init__(self, file: BinaryIO, read: list[tuple[int, int]]) -> None:
        self._file, self._read = file, read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, view: Any) -> int:
        start = self._file.tell()
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._read.append((start, start + count))
        return count


class NotedBlobs(LocalBlobStore):
    """A folder that notes which bytes of its blobs are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[tuple[int, int]] = []

    def open(self, artifact_id: str) -> BinaryIO:
        return NotedFile(super().open(artifact_id), self.read)  # type: ignore[return-value]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def artifact(store: ArtifactStore, factors: PrefixFactors) -> str:
    return publish(store, factors)


@pytest.fixture
def pool(model: PreTrainedModel, store: ArtifactStore) -> Iterator[PrefixPool]:
    made = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    yield made
    made.close()


def half_of(factors: PrefixFactors) -> PartFidelity:
    assert factors.fidelity is not None
    return factors.fidelity.parts[0]


def ask(pool: PrefixPool, artifact_id: str, part: PartFidelity | None) -> Prefix | LoadFailure:
    answers: queue.SimpleQueue[Prefix | LoadFailure] = queue.SimpleQueue()
    pool.request(artifact_id, TOKENS, answers.put, part=part, deadline_s=PATIENT)
    return answers.get(timeout=2 * PATIENT)


def given(pool: PrefixPool, artifact_id: str, part: PartFidelity | None) -> Prefix:
    found = ask(pool, artifact_id, part)
    assert isinstance(found, Prefix), found
    return found


def place_of(store: ArtifactStore, artifact_id: str, tensor: str) -> tuple[Path, int, int]:
    """The file, and where in it the bytes of a tensor begin and end."""
    path = Path(store.blobs.url) / "prefixes" / artifact_id[:2] / f"{artifact_id}.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[tensor]["data_offsets"]
    return path, 8 + length + start, 8 + length + end


def damage(store: ArtifactStore, artifact_id: str, tensor: str) -> None:
    path, start, _ = place_of(store, artifact_id, tensor)
    content = bytearray(path.read_bytes())
    content[start + 3] ^= 1
    path.write_bytes(content)


def test_names_of_residents() -> None:
    part = PartFidelity(share=0.5, top1_agreement=1.0, kl=0.0)
    whole, half = (resident_key("a" * 64, one) for one in (None, part))
    assert whole == "a" * 64 == artifact_of(half) == artifact_of(whole)
    assert is_part(half) and not is_part(whole)


def test_a_part_answers_as_the_factors_cut_so(
    pool: PrefixPool, model: PreTrainedModel, factors: PrefixFactors, artifact: str
) -> None:
    prefix = given(pool, artifact, half_of(factors))
    with enable_xkv(model):
        said = prompt_logits(model, XKVCache(prefix))
        cut = leading_part(factors, 0.5)
        assert torch.equal(said, prompt_logits(model, XKVCache.from_factors(model, cut)))
        assert not torch.equal(said, prompt_logits(model, XKVCache.from_factors(model, factors)))


def over_a_calibration(store: ArtifactStore, model: PreTrainedModel, basis: Any) -> tuple[str, PrefixFactors]:
    """An artifact with a calibration, and its factors; parts are measured."""
    identity = ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32")
    sample = [ProbedPrefix.of_text("text", range(80))]
    name = save_calibration(store, calibrated(model, size=3), identity, sample).id
    spec = CompressionSpec(ratio=1.5, calibration=name, factor_dtype="mixed", index="derived").over(basis)
    ids, calibration = random_ids(TOKENS), load_calibration(store, name)
    (factors,) = compress_each(model, ids, [spec], calibration, parts=True)
    return publish(store, factors), factors


@pytest.mark.parametrize("basis", ["calibrated", "document"])
def test_so_does_one_of_a_calibration(store: ArtifactStore, model: PreTrainedModel, basis: Any) -> None:
    artifact, factors = over_a_calibration(store, model, basis)
    pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    prefix = given(pool, artifact, half_of(factors))
    with enable_xkv(model):
        cut = XKVCache.from_factors(model, leading_part(factors, 0.5))
        torch.testing.assert_close(prompt_logits(model, XKVCache(prefix)), prompt_logits(model, cut))
    until(lambda: pool.state().prefixes == (artifact,))
    pool.close()


def test_a_part_of_latents(store: ArtifactStore) -> None:
    model = tiny_model("deepseek_v3", kv_lora_rank=96)
    spec = CompressionSpec(group_size=1, rank_k=90, rank_v=1)
    (factors,) = compress_each(model, random_ids(TOKENS), [spec], parts=True)
    artifact = publish(store, factors)
    pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    prefix = given(pool, artifact, half_of(factors))
    with enable_xkv(model):
        cut = XKVCache.from_factors(model, leading_part(factors, 0.5))
        assert torch.equal(prompt_logits(model, XKVCache(prefix)), prompt_logits(model, cut))
    pool.close()


def test_blocks_behind_a_part_are_not_read(
    tmp_path: Path, store: ArtifactStore, model: PreTrainedModel, factors: PrefixFactors, artifact: str
) -> None:
    blobs = NotedBlobs(tmp_path / "store")
    pool = PrefixPool(model, ArtifactStore(blobs, store.catalog), budget_bytes=ROOM, rates=LoadingRates(1e-3))  # type: ignore[arg-type]
    seen: list[list[tuple[int, int]]] = []
    pool.request(artifact, TOKENS, lambda _: seen.append(list(blobs.read)), part=half_of(factors))
    until(lambda: bool(seen))
    left_out = factors.to_tensors().keys() - leading_part(factors, 0.5).to_tensors().keys()
    assert any(".factors." in name for name in left_out)
    for name in left_out:
        _, start, end = place_of(store, artifact, name)
        assert all(last <= start or end <= first for first, last in seen[0]), name
    until(lambda: pool.state().prefixes == (artifact,))
    pool.close()


def test_the_whole_comes_by_itself_and_the_part_leaves_with_its_last_user(
    pool: PrefixPool, model: PreTrainedModel, factors: PrefixFactors, artifact: str
) -> None:
    half = half_of(factors)
    part, key = given(pool, artifact, half), resident_key(artifact, half)
    until(lambda: pool.state().prefixes == (artifact,) and pool.state().loading == 0)
    again = pool.take(artifact, TOKENS, half)
    assert again is part, "who has one goes on"
    whole = pool.take(artifact, TOKENS)
    assert whole is not None and whole is not part
    assert pool.state().holds == {key: 2, artifact: 1}
    both = pool.bytes
    pool.release(key)
    assert pool.bytes == both
    pool.release(key)
    alone = PrefixPool(model, pool._loading._store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    given(alone, artifact, None)
    assert pool.bytes == alone.bytes < both
    assert pool.take(artifact, TOKENS, half) is None
    counters = pool.state().counters
    assert (counters["loads"], counters["part_loads"], counters["evictions"]) == (2, 1, 0)
    alone.close()


def test_damage_in_a_part_is_found(
    model: PreTrainedModel, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    damage(store, artifact, "group.0.value.factors.1")
    told: list[str] = []
    pool = PrefixPool(
        model,
        store,
        budget_bytes=ROOM,
        rates=LoadingRates(1e-3),
        on_lost=lambda name, _: told.append(name),
    )
    found = ask(pool, artifact, half_of(factors))
    assert isinstance(found, LoadFailure) and found.reason == "corrupt"
    until(lambda: told == [artifact])
    state = pool.state()
    assert pool.bytes == 0 and state.reserved == 0 and state.loading == 0
    assert store.get(artifact) is None
    pool.close()


def test_damage_behind_a_part_is_found_with_the_whole_and_ends_the_part(
    model: PreTrainedModel, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    damage(store, artifact, "group.0.value.factors.3")
    told: list[str] = []
    pool = PrefixPool(
        model,
        store,
        budget_bytes=ROOM,
        rates=LoadingRates(1e-3),
        on_lost=lambda name, _: told.append(name),
    )
    half = half_of(factors)
    part = given(pool, artifact, half)
    until(lambda: told == [artifact])
    assert pool.state().counters["damaged"] == 1 and store.get(artifact) is None
    with enable_xkv(model):  # who has it goes on: these bytes were checked
        prompt_logits(model, XKVCache(part))
    assert pool.take(artifact, TOKENS, half) is None
    again = ask(pool, artifact, half)
    assert isinstance(again, LoadFailure) and again.reason == "evicted"
    pool._learn({artifact: "kept"})  # made again, or an answer of before
    assert pool.take(artifact, TOKENS, half) is None and pool.bytes > 0
    pool.release(resident_key(artifact, half))
    assert pool.bytes == 0 and not pool.gone
    pool.close()


def test_a_part_that_the_header_does_not_speak_of_is_not_given(
    pool: PrefixPool, factors: PrefixFactors, artifact: str
) -> None:
    half = half_of(factors)
    for other in (half.model_copy(update={"kl": half.kl / 2}), half.model_copy(update={"share": 0.1})):
        found = ask(pool, artifact, other)
        assert isinstance(found, LoadFailure) and found.reason == "slow_load"
    until(lambda: pool.state().prefixes == (artifact,))
    assert "part_loads" not in pool.state().counters


def test_a_packed_blob_is_read_whole(
    pool: PrefixPool, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    pytest.importorskip("zstandard")
    assert store.pack(artifact)
    found = ask(pool, artifact, half_of(factors))
    assert isinstance(found, LoadFailure) and found.reason == "slow_load"
    until(lambda: pool.state().prefixes == (artifact,))


def test_where_the_part_alone_has_room_it_stays_while_it_is_used(
    model: PreTrainedModel, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    budget = PrefixLoading(model, store, SelectionSpec(), None).announce(artifact).resident_bytes
    pool = PrefixPool(model, store, budget_bytes=budget, rates=LoadingRates(1e-3))
    half = half_of(factors)
    given(pool, artifact, half)
    until(lambda: pool.state().counters.get("failed_no_room", 0) == 1 and pool.state().loading == 0)
    assert pool.take(artifact, TOKENS, half) is not None
    pool.release(resident_key(artifact, half))
    assert pool.state().loading == 0, "it is still in use"
    pool.release(resident_key(artifact, half))
    until(lambda: pool.state().prefixes == (artifact,))  # by itself: nobody uses the part
    assert pool.bytes <= budget
    counters = pool.state().counters
    assert (counters["evictions"], counters["failed_no_room"]) == (1, 1)
    pool.close()


def test_a_part_of_what_is_gone_goes_too(
    pool: PrefixPool, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    half = half_of(factors)
    given(pool, artifact, half)
    until(lambda: pool.state().prefixes == (artifact,))
    store.remove(artifact)
    pool._learn(store.standings(pool._asked()))
    assert pool.take(artifact, TOKENS, half) is None and pool.state().prefixes == ()
    pool.release(resident_key(artifact, half))
    assert pool.bytes == 0


def test_a_part_that_comes_after_the_rest_was_found_damaged_is_not_given(
    model: PreTrainedModel, store: ArtifactStore, factors: PrefixFactors, artifact: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    real = pool._loading.bind

    def bind(*arguments: Any) -> Prefix:
        prefix = real(*arguments)
        with pool._lock:
            pool._spoil_parts(artifact)
        return prefix

    monkeypatch.setattr(pool._loading, "bind", bind)
    found = ask(pool, artifact, half_of(factors))
    assert isinstance(found, LoadFailure) and found.reason == "evicted"
    until(lambda: pool.state().prefixes == (artifact,) and pool.state().loading == 0)
    pool.close()


def test_a_part_of_another_file_than_was_announced_is_not_given(
    model: PreTrainedModel, store: ArtifactStore, factors: PrefixFactors, artifact: str
) -> None:
    """The artifact was made again in between, with other bytes."""
    loading, half = PrefixLoading(model, store, SelectionSpec(), None), half_of(factors)
    announced = loading.announce(artifact, half)
    assert announced.whole is not None
    tensors = announced.whole.tensors | {"tokens": "0" * 64}
    other = replace(announced, whole=announced.whole.model_copy(update={"tensors": tensors}))
    with pytest.raises(StoreError, match="made again while it was read"):
        loading.bind(other, None)
    assert loading.bind(announced, None).tokens == TOKENS


def test_only_parts_that_are_near_enough_are_offered(
    store: ArtifactStore, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, factors = over_a_calibration(store, model, "calibrated")
    near = PartFidelity(share=0.5, top1_agreement=0.9, kl=2e-4)
    far = PartFidelity(share=0.75, top1_agreement=1.0, kl=3e-4)
    written = store.manifest(name)
    fidelity = written.fidelity.model_copy(update={"parts": (near, far)})
    manifest = written.model_copy(update={"fidelity": fidelity})
    assert fidelity.positions == TOKENS // 8 and part_offers(manifest, 1.0, 0.0) == ()
    monkeypatch.setattr(parts, "LEAST_POSITIONS", TOKENS // 8)
    (offer,) = part_offers(manifest, 2.5e-4, 0.9)
    assert offer.measured == near
    kept = leading_part(factors, 0.5).to_tensors()
    for nbytes, tensors in ((offer.nbytes, kept), (offer.whole_nbytes, factors.to_tensors())):
        assert nbytes == sum(one.nbytes for name, one in tensors.items() if not name.startswith("rotary"))
    assert [one.measured for one in part_offers(manifest, 3e-4, 0.9)] == [near, far]
    assert part_offers(manifest, 3e-4, 0.91)[0].measured == far
    assert part_offers(manifest, 0.0, 0.0) == () == part_offers(manifest, 1e-4, 0.0)
    exact = fidelity.model_copy(update={"parts": (near.model_copy(update={"kl": 0.0}),)})
    assert part_offers(manifest.model_copy(update={"fidelity": exact}), 0.0, 0.0) == ()
    all_of_it = near.model_copy(update={"share": 1 - 2**-53})
    again = near.model_copy(update={"share": 0.5 + 2**-53})
    alike = fidelity.model_copy(update={"parts": (near, again, all_of_it)})
    assert part_offers(manifest.model_copy(update={"fidelity": alike}), 2.5e-4, 0.9) == (offer,)
    broken = manifest.model_copy(update={"spec": {"ratio": -1}})
    assert part_offers(broken, 2.5e-4, 0.9) == ()


def test_an_artifact_with_bases_of_its_own_offers_no_part(
    store: ArtifactStore, model: PreTrainedModel, artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LEAST_POSITIONS", 1)
    for name in (artifact, over_a_calibration(store, model, "document")[0]):
        assert store.manifest(name).fidelity.parts and part_offers(store.manifest(name), 1.0, 0.0) == ()
