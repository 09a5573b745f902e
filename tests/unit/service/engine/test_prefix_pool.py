"""A pool gives right prefixes, once loaded for all who ask, and never holds more than its budget."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import calibrated
from published import FINGERPRINT, SPEC, prompt_logits, publish, publish_some
from transformers import PreTrainedModel

from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine import catalog_upkeep
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.pool_loads import Load
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.storages import held_bytes
from xkv_service.modeling.models import find_model

SIZES = (120, 150, 180, 210, 240, 270)
PATIENT = 120.0
ROOM = 1 << 26

MakePool = Callable[..., PrefixPool]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path_factory.mktemp("store"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(store: ArtifactStore, model: PreTrainedModel) -> list[str]:
    return publish_some(store, model, SIZES)


@pytest.fixture
def make_pool(store: ArtifactStore, model: PreTrainedModel) -> Iterator[MakePool]:
    made: list[PrefixPool] = []

    def make(budget: int = ROOM, **options: Any) -> PrefixPool:
        made.append(PrefixPool(model, store, budget_bytes=budget, rates=LoadingRates(1e-3), **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def ask(pool: PrefixPool, artifact_id: str, tokens: int, deadline_s: float = PATIENT) -> Prefix | LoadFailure:
    answers: queue.SimpleQueue[Prefix | LoadFailure] = queue.SimpleQueue()
    pool.request(artifact_id, tokens, answers.put, deadline_s=deadline_s)
    return answers.get(timeout=2 * PATIENT)


def loaded(pool: PrefixPool, artifact_id: str, tokens: int) -> Prefix:
    found = ask(pool, artifact_id, tokens)
    assert isinstance(found, Prefix), found
    return found


def no_room(pool: PrefixPool, artifact_id: str, tokens: int) -> LoadFailure:
    """Why it waited in vain. A slow machine may not even have begun in little time."""
    for deadline_s in (0.2, 5.0, PATIENT):
        late = ask(pool, artifact_id, tokens, deadline_s=deadline_s)
        assert isinstance(late, LoadFailure)
        if late.reason == "no_room":
            break
        until(lambda: pool.state().loading == 0)
    assert late.reason == "no_room", late
    return late


def until(met: Callable[[], bool], seconds: float = PATIENT) -> None:
    """A load is told of before its thread has put everything down."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_a_prefix_from_the_pool_answers_as_one_from_its_artifact(
    make_pool: MakePool, store: ArtifactStore, model: PreTrainedModel, ids: list[str]
) -> None:
    pool = make_pool(fingerprint=FINGERPRINT)
    assert pool.take(ids[0], SIZES[0]) is None
    prefix = loaded(pool, ids[0], SIZES[0])
    assert pool.take(ids[0], SIZES[0]) is prefix
    with enable_xkv(model):
        for tokens in (SIZES[0], 77):
            ours = pool.take(ids[0], tokens)
            assert ours is not None and ours.tokens == tokens
            theirs = XKVCache.from_artifact(model, store, ids[0], tokens=tokens)
            assert torch.equal(prompt_logits(model, XKVCache(ours)), prompt_logits(model, theirs))


def test_a_shorter_prefix_costs_nothing_and_is_one_object_while_in_use(
    make_pool: MakePool, ids: list[str]
) -> None:
    pool = make_pool()
    loaded(pool, ids[0], SIZES[0])
    before = pool.bytes
    shorter = [pool.take(ids[0], 50) for _ in range(2)]
    assert shorter[0] is shorter[1] is not None and pool.bytes == before
    assert held_bytes(pool.take(ids[0], SIZES[0]), *shorter, device=torch.device("cpu")) == before


def test_tokens_that_an_artifact_does_not_have_are_no_prefix(make_pool: MakePool, ids: list[str]) -> None:
    pool = make_pool()
    for tokens in (0, SIZES[0] + 1):
        found = ask(pool, ids[0], tokens)
        assert isinstance(found, LoadFailure) and found.reason == "diverges"
    assert pool.state().holds == {}


def test_a_prefix_that_can_only_be_used_whole(store: ArtifactStore) -> None:
    model = tiny_model("gemma2")
    found = publish(store, compress(model, random_ids(80), SPEC))
    pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
    short = ask(pool, found, 50)
    assert isinstance(short, LoadFailure) and short.reason == "diverges" and "sliding" in short.detail
    assert loaded(pool, found, 80).tokens == 80
    pool.close()


def test_hundreds_of_requests_load_each_artifact_once(make_pool: MakePool, ids: list[str]) -> None:
    pool = make_pool()
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(300):
        place = number % len(ids)
        pool.request(ids[place], SIZES[place], told.put, deadline_s=PATIENT)
    prefixes = [told.get(timeout=PATIENT) for _ in range(300)]
    assert told.empty() and all(isinstance(one, Prefix) for one in prefixes)
    assert len({id(one) for one in prefixes}) == len(ids)
    state = pool.state()
    assert state.counters["loads"] == len(ids) and state.loading == 0
    assert sum(state.holds.values()) == 300


def test_under_a_tight_budget_everybody_is_served_and_it_holds(make_pool: MakePool, ids: list[str]) -> None:
    """Room for about two of six; the bytes are looked at all the time."""
    wide = make_pool()
    sizes = {}
    for one, size in zip(ids, SIZES, strict=True):
        before = wide.bytes
        loaded(wide, one, size)
        sizes[one] = wide.bytes - before
    budget = int(2.3 * max(sizes.values()))
    pool = make_pool(budget, threads=3)
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    random, stop, above = Random(0), threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            state = pool.state()
            if state.nbytes + state.reserved > budget:
                above.append(state)
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(300):
        place = random.randrange(len(ids))
        pool.request(
            ids[place],
            SIZES[place] - random.randrange(3),
            lambda found, one=ids[place]: told.put((one, found)),
            deadline_s=PATIENT,
        )
    for _ in range(300):
        one, found = told.get(timeout=PATIENT)
        assert isinstance(found, Prefix), found
        pool.release(one)
    stop.set()
    watcher.join()
    state = pool.state()
    assert not above and told.empty() and not state.holds and state.parked == state.loading == 0
    assert state.counters["evictions"] >= len(ids) - 2
    assert state.nbytes == sum(sizes[one] for one in state.prefixes) <= budget


def test_loads_that_ended_leave_without_a_garbage_collection(make_pool: MakePool, ids: list[str]) -> None:
    """The pool's two idle threads may still refer to their last ones, and those of other tests to theirs."""
    pool = make_pool(int(1.1 * _size(make_pool, ids[-1])))
    gc.collect()
    gc.disable()
    try:
        others = {id(one): one for one in _loads()}
        for turn in range(3 * len(ids)):
            pool.prefetch(ids[turn % len(ids)])
            until(lambda: not pool.state().loading)
        assert pool.state().counters["loads"] > 2 * len(ids)
        until(lambda: sum(id(one) not in others for one in _loads()) <= 2, seconds=10)
    finally:
        gc.enable()


def _loads() -> list[Load]:
    return [one for one in gc.get_objects() if type(one) is Load]


def test_held_prefixes_stay(make_pool: MakePool, ids: list[str]) -> None:
    size = _size(make_pool, ids[-1])
    pool = make_pool(int(2.1 * size))
    loaded(pool, ids[0], SIZES[0])  # held
    for place in (1, 2, 3):
        found = ask(pool, ids[place], SIZES[place], deadline_s=0.2)
        if isinstance(found, Prefix):
            pool.release(ids[place])
    assert ids[0] in pool.state().prefixes
    with pytest.raises(KeyError):
        pool.release(ids[1])
    with pytest.raises(KeyError):
        pool.hold("f" * 64)


@pytest.fixture
def pinned(store: ArtifactStore, ids: list[str]) -> Iterator[Callable[[int], str]]:
    """Pins artifacts in the store, for the test."""
    done: list[str] = []

    def pin(place: int) -> str:
        store.pin(ids[place])
        done.append(ids[place])
        return ids[place]

    yield pin
    for artifact_id in done:
        store.unpin(artifact_id)


def test_what_is_pinned_in_the_store_stays_until_pinned_ones_need_the_room(
    make_pool: MakePool, ids: list[str], pinned: Callable[[int], str], caplog: pytest.LogCaptureFixture
) -> None:
    size = _size(make_pool, ids[-1])
    pool = make_pool(int(2.1 * size))
    first = pinned(0)
    for place in (0, 1, 2, 3, 4):  # the pinned one is the longest unused all the time
        loaded(pool, ids[place], SIZES[place])
        pool.release(ids[place])
    state = pool.state()
    assert first in state.prefixes and state.pins == {first} == state.staying
    assert state.counters["evictions"] > 0 == state.counters["pinned_evictions"]
    for place in (3, 5):
        pinned(place)
        loaded(pool, ids[place], SIZES[place])
        pool.release(ids[place])
    until(lambda: first not in pool.state().prefixes)
    assert pool.state().counters["pinned_evictions"] == 1 and f"{first[:12]} is pinned" in caplog.text


def test_where_pinned_ones_fill_the_memory_nobody_waits_in_vain(
    make_pool: MakePool, ids: list[str], pinned: Callable[[int], str]
) -> None:
    pool = make_pool(int(1.2 * _size(make_pool, ids[-1])))
    loaded(pool, pinned(5), SIZES[5])
    pool.release(ids[5])
    found = ask(pool, ids[4], SIZES[4], deadline_s=PATIENT)
    assert isinstance(found, LoadFailure) and found.reason == "no_room"
    assert f"pinned ones besides {pool.bytes:,}, " in found.fault and "in use" not in found.fault
    assert pool.state().parked == 0 and ids[5] in pool.state().prefixes


def test_pins_that_are_set_and_taken_back_later_are_noticed(
    make_pool: MakePool, store: ArtifactStore, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_upkeep, "EVERY_S", 0.1)
    pool = make_pool(int(1.2 * _size(make_pool, ids[-1])))
    loaded(pool, ids[5], SIZES[5])
    pool.release(ids[5])
    store.pin(ids[5])
    until(lambda: pool.state().pins == {ids[5]})
    assert isinstance(ask(pool, ids[4], SIZES[4]), LoadFailure)
    store.unpin(ids[5])
    until(lambda: not pool.state().pins)
    assert isinstance(ask(pool, ids[4], SIZES[4]), Prefix)
    assert pool.state().prefixes == (ids[4],)


def test_who_finds_no_room_waits_for_it_and_is_told_why_in_time(make_pool: MakePool, ids: list[str]) -> None:
    size = _size(make_pool, ids[-1])
    pool = make_pool(int(1.2 * size))
    loaded(pool, ids[5], SIZES[5])
    late = no_room(pool, ids[4], SIZES[4])
    budget = pool.state().budget
    assert f"of the {budget:,} for prefixes" in late.detail
    assert f"which are: prefixes in use {pool.bytes:,}, free for it {budget - pool.bytes:,}" in late.fault
    assert pool.state().parked == 0
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pool.request(ids[4], SIZES[4], told.put, deadline_s=PATIENT)
    until(lambda: pool.state().parked == 1)
    assert not pool.loading
    pool.release(ids[5])
    assert isinstance(told.get(timeout=PATIENT), Prefix)
    assert pool.state().prefixes == (ids[4],)


def test_what_is_larger_than_the_budget_is_refused_at_once(make_pool: MakePool, ids: list[str]) -> None:
    found = ask(make_pool(1000), ids[0], SIZES[0])
    assert isinstance(found, LoadFailure) and found.reason == "no_room"
    assert found.detail.endswith("bytes, more than the 1,000 for prefixes")


def test_an_evicted_prefix_is_freed(make_pool: MakePool, ids: list[str]) -> None:
    size = _size(make_pool, ids[-1])
    pool = make_pool(int(1.2 * size))
    prefix = loaded(pool, ids[4], SIZES[4])
    layer = prefix.layers[0]
    watched = [weakref.ref(prefix), weakref.ref(layer), weakref.ref(layer.positions)]
    watched += [weakref.ref(layer._key_factors)]
    del prefix, layer
    gc.collect()
    assert all(ref() is not None for ref in watched)
    pool.release(ids[4])
    loaded(pool, ids[5], SIZES[5])
    until(lambda: gc.collect() >= 0 and all(ref() is None for ref in watched))


def test_the_header_is_part_of_what_a_load_takes(
    make_pool: MakePool, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a prefix waits for it too: else a slow store is believed to be quicker than it is."""
    pool = make_pool()
    announce = pool._loading.announce

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return announce(*given)

    monkeypatch.setattr(pool._loading, "announce", slowly)
    loaded(pool, ids[0], SIZES[0])
    assert pool.state().counters["load_seconds"] > 0.3


def test_prefetching_makes_the_next_request_immediate(make_pool: MakePool, ids: list[str]) -> None:
    pool = make_pool()
    pool.prefetch(ids[0])
    loaded(pool, ids[0], SIZES[0])
    pool.release(ids[0])
    assert pool.take(ids[0], SIZES[0]) is not None
    assert pool.state().counters["loads"] == 1


def test_a_selection_that_the_artifact_has_no_index_for(
    make_pool: MakePool, model: PreTrainedModel, ids: list[str]
) -> None:
    found = ask(make_pool(selection=SelectionSpec("landmark")), ids[0], SIZES[0])
    assert isinstance(found, LoadFailure) and found.reason == "no_artifact" and "index" in found.fault


def test_a_closed_pool_answers_too(make_pool: MakePool, ids: list[str]) -> None:
    pool = make_pool()
    loaded(pool, ids[0], SIZES[0])
    pool.close()
    found = ask(pool, ids[0], SIZES[0])
    assert isinstance(found, LoadFailure) and found.reason == "unavailable"


def test_a_calibration_is_read_and_counted_once(tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path / "model")
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        ids = [_with_calibration(store, model, tmp_path / "model", size)[0] for size in SIZES[:3]]
        pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
        prefixes = [loaded(pool, one, size) for one, size in zip(ids, SIZES, strict=False)]
        # All they reach are its bases; its metric and energies are kept beside.
        reached = held_bytes(*prefixes, device=torch.device("cpu"))
        alone = sum(held_bytes(prefix, device=torch.device("cpu")) for prefix in prefixes)
        assert reached < pool.bytes < alone
        assert len({prefix.layers[0].key_bases.data_ptr() for prefix in prefixes}) == 1
        assert pool.state().prefixes == tuple(ids)
        assert set(pool.state().holds) == set(ids)
        pool.close()


def test_a_calibration_leaves_with_the_last_prefix_that_needs_it(tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path / "model")
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        calibrated_id, saved = _with_calibration(store, model, tmp_path / "model", SIZES[0])
        plain = publish_some(store, model, SIZES[-1:], CompressionSpec(group_size=3, rank_k=64, rank_v=64))[0]
        pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
        loaded(pool, calibrated_id, SIZES[0])
        first = pool.bytes
        loaded(pool, plain, SIZES[-1])
        second = pool.bytes - first
        pool.close()
        budget = max(first, second) + 20_000  # promises are a little more than what is held
        tight = PrefixPool(model, store, budget_bytes=budget, rates=LoadingRates(1e-3))
        for _ in range(2):
            loaded(tight, calibrated_id, SIZES[0])
            assert tight.bytes == first
            tight.release(calibrated_id)
            loaded(tight, plain, SIZES[-1])
            tight.release(plain)
            assert tight.bytes <= budget
        small = PrefixPool(model, store, budget_bytes=first - 20_000, rates=LoadingRates(1e-3))
        found = ask(small, calibrated_id, SIZES[0])
        assert isinstance(found, LoadFailure) and found.reason == "no_room"
        tight.close()
        small.close()


def test_who_has_the_memory_is_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pinned prefix and one in use, over one calibration, which is neither's own."""
    model = tiny_model("llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path / "model")
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        ids = [_with_calibration(store, model, tmp_path / "model", size)[0] for size in SIZES[:3]]
        store.pin(ids[0])
        pool = PrefixPool(model, store, budget_bytes=ROOM, rates=LoadingRates(1e-3))
        loaded(pool, ids[0], SIZES[0])
        pool.release(ids[0])
        until(lambda: pool.state().pins == {ids[0]})
        with_one = pool.bytes
        loaded(pool, ids[1], SIZES[1])
        in_use = pool.bytes - with_one
        entries = pool._residents._entries
        shared = next(entry.nbytes for key, entry in entries.items() if key.startswith("calibration"))
        pool._residents.budget = pool.bytes + 1000
        found = no_room(pool, ids[2], SIZES[2])
        assert found.fault.endswith(
            f"which are: prefixes in use {in_use:,}, pinned ones besides {with_one - shared:,}, "
            f"calibrations that both need {shared:,}, free for it 1,000"
        )
        assert found.fault in caplog.text
        assert found.detail.endswith("those in use, pinned or being loaded leave it no room")
        pool.close()


def _with_calibration(
    store: ArtifactStore, model: PreTrainedModel, folder: Path, tokens: int
) -> tuple[str, str]:
    """A prefix with a calibration's bases in the store: the artifact's id and the calibration's."""
    identity = find_model(folder, device="cpu").identity
    sample = [ProbedPrefix.of_text("text", range(80))]
    saved = save_calibration(store, calibrated(model), identity, sample).id
    spec = CompressionSpec(
        calibration=saved, ratio=2.0, basis="calibrated", factor_dtype="mixed", index="derived"
    )
    factors = compress(model, random_ids(tokens, seed=tokens), spec, load_calibration(store, saved))
    return publish(store, factors, identity.fingerprint), saved


def _size(make_pool: MakePool, artifact_id: str) -> int:
    pool = make_pool()
    loaded(pool, artifact_id, SIZES[-1])
    return pool.bytes
