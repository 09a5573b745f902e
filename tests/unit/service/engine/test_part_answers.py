"""An engine answers from a part when, and only when, the whole comes too late and the part does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import Asked, StillRates, generated, until
from compressed import manifest_of
from families import tiny_model
from talking import BYTES, DOCUMENT, SELECTION, Talker
from test_pool_faults import SlowBlobs

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec
from xkv_service.compression import compress_each
from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import PartOffer, PrefixMatch
from xkv_service.engine.parts import resident_key
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.stored_tails import StoredTails
from xkv_service.leading_part import leading_part
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.prompts import render_prefix

TEXT = DOCUMENT * 2
SETTINGS = EngineSettings(max_running=8, step_tokens=64, prefill_tokens=512, selection=SELECTION)
PREFILL_S = 20.0
"""That the prompt's prefill is believed to take: a request may wait for its prefix so long."""


@pytest.fixture(scope="module")
def wide(tokenizer: Any) -> Talker:
    """One whose artifact has blocks of columns to leave out."""
    model = tiny_model(
        "llama",
        num_key_value_heads=4,
        head_dim=32,
        hidden_size=128,
        vocab_size=BYTES,
        max_position_embeddings=1024,
        eos_token_id=0,
    )
    identity = ModelIdentity(fingerprint="7" * 64, name="tiny", architecture="llama", dtype="float32")
    spec = CompressionSpec(group_size=3, rank_k=200, rank_v=200)
    (factors,) = compress_each(model, render_prefix(tokenizer, TEXT), [spec], parts=True)
    return Talker(LoadedModel(model, tokenizer, identity), factors)


class Served:
    """An engine over a store of its own with one artifact, and what it believes that loading takes."""

    def __init__(self, talker: Talker, root: Path, part_s: float, whole_s: float) -> None:
        self.talker, self.factors = talker, talker.factors
        ids, identity = self.factors.token_ids.tolist(), talker.loaded.identity
        self.opened = ArtifactStore.open(str(root))
        self.blobs = SlowBlobs(root)
        self.store = ArtifactStore(self.blobs, self.opened.catalog)  # type: ignore[arg-type]
        manifest = manifest_of(self.factors)
        name = artifact_id(identity.fingerprint, "default", ids, manifest.spec)
        manifest = manifest.model_copy(update={"model": identity, "id": name})
        self.artifact = self.store.publish(manifest, self.factors.to_tensors()).id
        assert self.factors.fidelity is not None
        self.half = self.factors.fidelity.parts[0]
        part, whole = leading_part(self.factors, 0.5).nbytes, self.factors.nbytes
        self.match = PrefixMatch(self.artifact, len(ids), parts=(PartOffer(self.half, part, whole),))
        rates = StillRates(PREFILL_S / len(ids))
        for _ in range(16):
            rates.loaded(part, len(ids), part_s, whole_nbytes=whole)
            rates.loaded(whole, len(ids), whole_s)
        self.pool = PrefixPool(talker.model, self.store, SELECTION, 2**26, rates=rates)
        self.stored = StoredTails(talker.loaded, self.store.tails, self.pool, SETTINGS)
        self.engine = Engine(talker.loaded, SETTINGS, self.pool, self.stored)

    def prompt(self, question: str = "Where does it end?") -> list[int]:
        messages = [{"role": "user", "content": f"{TEXT}\n\n{question}"}]
        ids: list[int] = self.talker.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def ask(self, ids: list[int], **fields: Any) -> Asked:
        return Asked(self.engine, ids, **{"match": self.match, **fields})

    def said(self, ids: list[int], *, part: bool) -> list[int]:
        """What Transformers' own loop says behind the part, or the whole."""
        factors = leading_part(self.factors, 0.5) if part else self.factors
        return generated(replace(self.talker, factors=factors), ids, prefix=True)

    def whole_is_there(self) -> bool:
        state = self.pool.state()
        return state.prefixes == (self.artifact,) and state.loading == 0

    def close(self) -> None:
        for event in self.blobs.hanging.values():
            event.set()
        self.engine.close()
        self.stored.close()
        self.pool.close()
        self.opened.close()


@pytest.fixture
def times() -> tuple[float, float]:
    """Seconds that loading the part and the whole are believed to take."""
    return 15.0, 25.0


@pytest.fixture
def served(wide: Talker, tmp_path: Path, times: tuple[float, float]) -> Iterator[Served]:
    made = Served(wide, tmp_path / "store", *times)
    yield made
    made.close()


def test_a_part_answers_first_and_the_whole_from_then_on(served: Served) -> None:
    ids = served.prompt()
    one = served.ask(ids).wait()
    assert one.started.part == 0.5 and one.started.artifact_id == served.artifact
    assert one.started.miss is None and one.started.prefix_tokens == served.match.tokens
    assert one.tokens == served.said(ids, part=True)
    until(served.whole_is_there)
    until(lambda: served.pool.state().holds == {})
    assert resident_key(served.artifact, served.half) not in served.pool._residents
    two = served.ask(served.prompt("Where?")).wait()
    assert two.started.part is None and two.started.artifact_id == served.artifact
    assert two.tokens == served.said(served.prompt("Where?"), part=False)
    counters = served.engine.state().counters
    assert (counters["from_part"], counters["from_artifact"]) == (1, 2)
    assert (counters["prefixes_part_loads"], counters["prefixes_loads"]) == (1, 2)


@pytest.mark.parametrize(
    ("times", "reason"),
    [((15.0, 18.0), None), ((15.0, 25.0), "part"), ((22.0, 25.0), "slow_load"), ((1.0, 1.5), None)],
)
def test_when_a_part_is_used(served: Served, reason: str | None) -> None:
    started = served.ask(served.prompt()).wait().started
    if reason == "part":
        assert started.part == 0.5 and started.miss is None
    elif reason is None:
        assert started.part is None and started.artifact_id == served.artifact
    else:
        assert started.part is None and started.artifact_id is None
        assert started.miss is not None and started.miss.reason == reason
    until(served.whole_is_there)


def test_without_an_offer_the_prompt_is_computed(served: Served) -> None:
    """The server's bound, or the artifact, allows none."""
    started = served.ask(served.prompt(), match=replace(served.match, parts=())).wait().started
    assert started.part is None and started.miss is not None and started.miss.reason == "slow_load"
    until(served.whole_is_there)


def test_what_came_behind_a_part_is_not_kept(served: Served) -> None:
    """The next turn goes on from the whole, and what the first one said is computed behind it."""
    ids = served.prompt()
    one = served.ask(ids).wait()
    assert one.started.part == 0.5
    until(lambda: served.whole_is_there() and served.engine.state().running == 0)
    assert served.engine.state().kept_tails == 0
    longer = [*ids, *one.tokens, *served.prompt("And then?")[-30:]]
    two = served.ask(longer).wait()
    assert two.started.cached_tokens == served.match.tokens and two.started.part is None
    assert two.tokens == served.said(longer, part=False)
    until(lambda: served.engine.state().kept_tails == 1)


def test_many_at_once_share_one_part(served: Served) -> None:
    prompts = [served.prompt(f"{number}: where?") for number in range(6)]
    asked = [served.ask(prompt) for prompt in prompts]
    for one, prompt in zip(asked, prompts, strict=True):
        part = one.wait().started.part
        assert one.started.artifact_id == served.artifact
        assert one.tokens == served.said(prompt, part=part is not None)
    assert asked[0].started.part == 0.5
    until(lambda: served.whole_is_there() and served.pool.state().holds.keys() <= {served.artifact})
    assert served.engine.state().counters["prefixes_part_loads"] == 1


def test_a_request_that_leaves_while_its_part_is_loaded_holds_nothing(served: Served) -> None:
    gate = served.blobs.hanging[served.artifact] = threading.Event()
    asked = served.ask(served.prompt())
    until(lambda: bool(served.pool.state().loading))
    asked.cancel()
    asked.wait()
    gate.set()
    until(lambda: served.whole_is_there() and served.pool.state().holds == {})
    assert resident_key(served.artifact, served.half) not in served.pool._residents


def test_a_part_that_comes_too_late_after_all(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole one: the prompt is computed, and the load goes on."""
    gate = served.blobs.hanging[served.artifact] = threading.Event()
    monkeypatch.setattr(served.pool.rates, "deadline_s", lambda tokens: 0.3)
    monkeypatch.setattr(served.pool.rates, "part_in_time", lambda *sizes: True)
    for _ in range(2):  # the second one does not even wait
        asked = served.ask(served.prompt("Who?")).wait()
        assert asked.started.miss is not None and asked.started.miss.reason == "slow_load"
        assert asked.tokens == generated(served.talker, served.prompt("Who?"))
    gate.set()
    until(served.whole_is_there)
