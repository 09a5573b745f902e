"""Whatever is wrong with blobs, disks or Redis: an answer in time, with the reason, and others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import calibrated
from published import FINGERPRINT, prompt_logits, publish, publish_some
from redis_server import RedisServer
from test_prefix_pool import PATIENT, ROOM, SIZES, ask, loaded, until
from transformers import PreTrainedModel

from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.modeling.models import find_model


class SlowBlobs(LocalBlobStore):
    """A folder whose blobs open when the test says; the others' are not affected."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hanging: dict[str, threading.Event] = {}
        self.opened: list[str] = []

    def open(self, artifact_id: str) -> BinaryIO:
        self.opened.append(artifact_id)
        if artifact_id in self.hanging:
            self.hanging[artifact_id].wait()
        return super().open(artifact_id)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def slow(tmp_path: Path, store: ArtifactStore) -> Iterator[tuple[ArtifactStore, SlowBlobs]]:
    blobs = SlowBlobs(tmp_path / "store")
    yield ArtifactStore(blobs, store.catalog), blobs
    for event in blobs.hanging.values():
        event.set()


def _pool(model: PreTrainedModel, store: ArtifactStore, **options: Any) -> PrefixPool:
    return PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3), **options)


def _failed(found: Prefix | LoadFailure) -> LoadFailure:
    assert isinstance(found, LoadFailure), found
    assert "\n" not in found.detail and found.detail
    return found


def _path(store: ArtifactStore, artifact_id: str, folder: str = "prefixes") -> Path:
    return Path(store.blobs.url) / folder / artifact_id[:2] / f"{artifact_id}.safetensors"


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_a_damaged_blob_is_quarantined_and_told_once(store: ArtifactStore, model: PreTrainedModel) -> None:
    bad, good = publish_some(store, model, SIZES[:2])
    _damage(_path(store, bad))
    told: list[tuple[str, LoadFailure]] = []
    pool = _pool(model, store, on_lost=lambda one, failure: told.append((one, failure)))
    answers: list[Any] = []
    for _ in range(20):
        pool.request(bad, SIZES[0], answers.append, deadline_s=PATIENT)
    loaded(pool, good, SIZES[1])
    until(lambda: len(answers) == 20 and bool(told))
    # Those who came after it was found damaged hear that it is gone.
    assert {one.reason for one in answers} <= {"corrupt", "evicted"} and answers[0].reason == "corrupt"
    assert [one for one, _ in told] == [bad] and "checksum" in told[0][1].fault
    assert not _path(store, bad).exists() and store.get(bad) is None
    assert _failed(ask(pool, bad, SIZES[0])).reason == "evicted"
    state = pool.state()
    assert state.reserved == 0 and state.prefixes == (good,)
    pool.close()


def test_damage_that_nobody_waits_for_is_told(store: ArtifactStore, model: PreTrainedModel) -> None:
    bad, worse = publish_some(store, model, SIZES[:2])
    told: list[str] = []

    def tell(name: str, failure: LoadFailure) -> None:
        told.append(name)
        raise RuntimeError("the loader's thread goes on")

    pool = _pool(model, store, threads=1, on_lost=tell)
    for name in (bad, worse):
        _damage(_path(store, name))
        pool.prefetch(name)
    until(lambda: told == [bad, worse])
    assert pool.state().counters["damaged"] == 2
    pool.close()


def test_a_lost_blob_is_told_once(store: ArtifactStore, model: PreTrainedModel) -> None:
    """Its file is gone, and nobody deleted it."""
    (lost,) = publish_some(store, model, SIZES[:1])
    _path(store, lost).unlink()
    told: list[tuple[str, LoadFailure]] = []
    pool = _pool(model, store, on_lost=lambda one, failure: told.append((one, failure)))
    answers: list[Any] = []
    for _ in range(20):
        pool.request(lost, SIZES[0], answers.append, deadline_s=PATIENT)
    until(lambda: len(answers) == 20 and bool(told))
    assert {one.reason for one in answers} <= {"missing", "evicted"} and answers[0].reason == "missing"
    assert [one for one, _ in told] == [lost] and "its file is gone" in told[0][1].fault
    assert _failed(ask(pool, lost, SIZES[0])).reason == "evicted"
    counters = pool.state().counters
    assert counters["missing"] == 1 and "damaged" not in counters and counters["failed_missing"] >= 1
    assert list(store.damaged.all()) == [lost]
    pool.close()


def test_a_removed_blob_is_evicted(store: ArtifactStore, model: PreTrainedModel) -> None:
    (gone,) = publish_some(store, model, SIZES[:1])
    store.remove(gone)
    pool = _pool(model, store)
    assert _failed(ask(pool, gone, SIZES[0])).reason == "evicted"
    assert _failed(ask(pool, "no id", 3)).reason == "evicted"
    pool.close()


def test_a_blob_removed_while_it_is_resident_goes_on(store: ArtifactStore, model: PreTrainedModel) -> None:
    (one,) = publish_some(store, model, SIZES[:1])
    pool = _pool(model, store)
    loaded(pool, one, SIZES[0])
    store.remove(one)
    assert pool.take(one, SIZES[0]) is not None
    pool.close()


def test_another_model(store: ArtifactStore, model: PreTrainedModel) -> None:
    (one,) = publish_some(store, model, SIZES[:1])
    pool = _pool(model, store, fingerprint="1" * 64)
    assert _failed(ask(pool, one, SIZES[0])).reason == "other_model"
    pool.close()
    other = _pool(tiny_model("llama", seed=1), store, fingerprint=FINGERPRINT)
    failure = _failed(ask(other, one, SIZES[0]))
    assert failure.reason == "other_model" and "first keys" in failure.fault
    other.close()


def test_a_slow_load_is_told_in_time_and_found_by_the_next(
    slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel
) -> None:
    store, blobs = slow
    late, quick = publish_some(store, model, SIZES[:2])
    pool = _pool(model, store, threads=1)
    _hang(pool, blobs, late, SIZES[0])
    # Nobody waits in vain for what others gave up, and a thread is there for the others.
    begin = time.monotonic()
    assert _failed(ask(pool, late, SIZES[0])).reason == "slow_load"
    loaded(pool, quick, SIZES[1])
    assert time.monotonic() - begin < PATIENT / 2
    blobs.hanging[late].set()
    until(lambda: late in pool.state().prefixes)
    assert pool.take(late, SIZES[0]) is not None
    assert pool.state().counters["failed_slow_load"] == 1
    pool.close()


def test_what_was_waited_for_in_vain_is_not_expected_in_time_again(
    slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel
) -> None:
    store, blobs = slow
    late, other = publish_some(store, model, SIZES[:2])
    pool = _pool(model, store)
    pool.rates = LoadingRates(0.1)
    assert pool.rates.decide(SIZES[1]) == "load"
    _hang(pool, blobs, late, SIZES[0])
    assert pool.rates.decide(SIZES[1]) == "prefill" and pool.loading
    blobs.hanging[late].set()
    until(lambda: late in pool.state().prefixes and not pool.loading)
    assert pool.rates.decide(SIZES[1]) == "load"  # it has ended, and was no slower than that
    loaded(pool, other, SIZES[1])
    pool.close()


def test_waiting_for_a_thread_says_nothing_of_loads(
    slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel
) -> None:
    store, blobs = slow
    first, second = publish_some(store, model, SIZES[:2])
    for one in (first, second):
        blobs.hanging[one] = threading.Event()
    pool = _pool(model, store, threads=1)
    pool.rates = LoadingRates(0.1)
    pool.request(first, SIZES[0], lambda found: None, deadline_s=PATIENT)
    told = threading.Event()
    pool.request(second, SIZES[1], lambda found: told.set(), deadline_s=0.5)
    time.sleep(0.4)
    blobs.hanging[first].set()  # the second one's load begins when there is little left to wait
    assert told.wait(PATIENT)
    assert pool.rates.decide(SIZES[1]) == "load"
    pool.close()


def test_a_queue_of_loads_counts(slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel) -> None:
    """Who would wait for others' loads first does not wait in vain."""
    store, blobs = slow
    first, second, third = publish_some(store, model, SIZES[:3])
    pool = _pool(model, store, threads=1)
    for _ in range(4):
        pool.rates.loaded(1000, SIZES[2], 0.4 * pool.rates.prefill_s(SIZES[2]))
    for one in (first, second):
        blobs.hanging[one] = threading.Event()
        pool.prefetch(one)
    assert pool.decide(third, SIZES[2], 1000) == "prefill"  # a third load takes three times as long
    assert pool.decide(second, SIZES[2], 1000) == "load"  # on its way
    for one in (first, second):
        blobs.hanging[one].set()
    until(lambda: pool.state().loading == 0 and second in pool.state().prefixes)
    assert pool.decide(third, SIZES[2], 1000) == "load"
    pool.close()


def test_the_deadline_is_what_a_prefill_takes(
    slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel
) -> None:
    store, blobs = slow
    (late,) = publish_some(store, model, SIZES[:1])
    blobs.hanging[late] = threading.Event()
    pool = _pool(model, store)
    told, begin = threading.Event(), time.monotonic()
    pool.request(late, SIZES[0], lambda found: told.set())
    assert told.wait(PATIENT)
    assert time.monotonic() - begin >= SIZES[0] * 1e-3
    pool.close()


def test_reads_that_hang_do_not_stop_the_others(
    slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel
) -> None:
    store, blobs = slow
    ids = publish_some(store, model, SIZES)
    pool = _pool(model, store, threads=2)
    for one, size in zip(ids[:4], SIZES, strict=False):
        _hang(pool, blobs, one, size)
    for one, size in zip(ids[4:], SIZES[4:], strict=True):
        loaded(pool, one, size)
    for event in blobs.hanging.values():
        event.set()
    until(lambda: set(pool.state().prefixes) == set(ids))
    until(lambda: sum(one.name.startswith("prefix-loader") for one in threading.enumerate()) <= 2)
    pool.close()


def test_a_store_that_cannot_be_read_is_unavailable(
    store: ArtifactStore, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = publish_some(store, model, SIZES[:1])
    folder = _path(store, one).parent
    pool = _pool(model, store)
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.mkdir()
    (folder / f"{one}.safetensors").mkdir()  # a folder in its place: opening it is an error, not its absence
    failure = _failed(ask(pool, one, SIZES[0]))
    assert failure.reason == "unavailable" and "cannot read" in failure.fault
    (folder / f"{one}.safetensors").rmdir()
    folder.rmdir()
    moved.rename(folder)
    loaded(pool, one, SIZES[0])
    pool.close()


def test_without_redis_prefixes_are_loaded_and_damage_is_told(tmp_path: Path, model: PreTrainedModel) -> None:
    """The link waits long for Redis; no load does."""
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    with ArtifactStore.open(str(tmp_path / "store"), redis.url, patience_s=10 * PATIENT) as store:
        good, bad = publish_some(store, model, SIZES[:2])
        _damage(_path(store, bad))
        redis.kill()
        pool = _pool(model, store)
        begin = time.monotonic()
        prefix = loaded(pool, good, SIZES[0])
        assert _failed(ask(pool, bad, SIZES[1])).reason == "corrupt"
        assert time.monotonic() - begin < PATIENT
        with enable_xkv(model):
            logits = prompt_logits(model, XKVCache(prefix))
            expected = prompt_logits(model, XKVCache.from_artifact(model, store, good))
        assert torch.equal(logits, expected)
        pool.close()


@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_calibration_that_cannot_be_used(tmp_path: Path, store: ArtifactStore, fault: str) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path / "model")
    identity = find_model(tmp_path / "model", device="cpu").identity
    sample = [ProbedPrefix.of_text("text", range(80))]
    saved = save_calibration(store, calibrated(model), identity, sample).id
    spec = CompressionSpec(
        calibration=saved, ratio=2.0, basis="calibrated", factor_dtype="mixed", index="derived"
    )
    factors = compress(model, random_ids(200), spec, load_calibration(store, saved))
    one = publish(store, factors, identity.fingerprint)
    own = publish_some(store, model, SIZES[:1])[0]
    if fault == "damaged":
        _damage(_path(store, saved, "calibrations"))
    else:
        store.calibrations.remove(saved)
    told: list[str] = []
    pool = _pool(model, store, on_lost=lambda artifact_id, failure: told.append(artifact_id))
    failure = _failed(ask(pool, one, 200))
    assert failure.reason == "corrupt" and "calibration" in failure.fault
    until(lambda: told == [one])
    loaded(pool, own, SIZES[0])
    assert pool.state().reserved == 0
    pool.close()


def test_closing_tells_those_who_wait(slow: tuple[ArtifactStore, SlowBlobs], model: PreTrainedModel) -> None:
    store, blobs = slow
    (late,) = publish_some(store, model, SIZES[:1])
    blobs.hanging[late] = threading.Event()
    pool = _pool(model, store)
    answers: list[Any] = []
    pool.request(late, SIZES[0], answers.append, deadline_s=PATIENT)
    pool.close()
    assert [one.reason for one in answers] == ["unavailable"]


def test_a_caller_that_fails_does_not_cost_the_others_their_answer(
    store: ArtifactStore, model: PreTrainedModel
) -> None:
    (one,) = publish_some(store, model, SIZES[:1])
    pool = _pool(model, store)

    def fail(found: Any) -> None:
        raise RuntimeError("the caller's own")

    pool.request(one, SIZES[0], fail, deadline_s=PATIENT)
    loaded(pool, one, SIZES[0])
    pool.close()


def _hang(pool: PrefixPool, blobs: SlowBlobs, artifact_id: str, tokens: int) -> None:
    """A load that hangs in its read, and that somebody has given up. Only one that began can be too slow."""
    blobs.hanging[artifact_id] = threading.Event()
    pool.prefetch(artifact_id)
    until(lambda: artifact_id in blobs.opened)
    assert _failed(ask(pool, artifact_id, tokens, deadline_s=0.1)).reason == "slow_load"
