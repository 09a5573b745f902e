"""What is told of an answer that a part of an artifact gave, and who may be given one."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engines import AlwaysLoad, wait_until
from measured import calibrated
from rivers import DOCUMENT, SETTINGS, publish
from serving import serve

from xkv_artifacts.manifest import PartFidelity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.local import EngineBackend
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.settings import APISettings
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import save_calibration
from xkv_service.engine import parts
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import Way
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.models import LoadedModel

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": f"{DOCUMENT}\n\nWhere does it end?"}],
    "temperature": 0,
    "max_tokens": 5,
}
GOOD = PartFidelity(share=0.5, top1_agreement=1.0, kl=1e-4)
POOR = PartFidelity(share=0.75, top1_agreement=1.0, kl=3e-4)


class WholeIsLate(AlwaysLoad):
    """Parts come in time."""

    def decide(self, tokens: int, nbytes: int | None = None, rounds: int = 1) -> Way:
        return "prefill"

    def part_in_time(self, tokens: int, nbytes: int, whole_nbytes: int) -> bool:
        return nbytes < whole_nbytes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of few tokens have parts, too."""
    monkeypatch.setattr(parts, "LEAST_POSITIONS", 1)


@pytest.fixture
def own_store(tmp_path: Any) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as opened:
        yield opened


@pytest.fixture
def parted(own_store: ArtifactStore, loaded: LoadedModel) -> PrefixManifest:
    """The artifact of `DOCUMENT`, with two parts, one of which is far from the exact cache."""
    sample = [ProbedPrefix.of_text("text", range(80))]
    name = save_calibration(own_store, calibrated(loaded.model, size=4), loaded.identity, sample).id
    spec = CompressionSpec(
        ratio=1.2, calibration=name, basis="calibrated", factor_dtype="mixed", index="derived"
    )
    return publish(own_store, loaded, DOCUMENT, spec=spec, parts=(GOOD, POOR))


@pytest.fixture
def http(
    own_store: ArtifactStore, loaded: LoadedModel, served_model: ServedModel, parted: PrefixManifest
) -> Iterator[httpx.Client]:
    finder = PrefixFinder(own_store, loaded.identity, SETTINGS)
    pool = PrefixPool(loaded.model, own_store, rates=WholeIsLate(1.0))
    with Engine(loaded, prefixes=pool) as engine:
        backend = EngineBackend(engine)
        app = create_app(served_model, backend, finder=finder, keys=KeyRing(), settings=SETTINGS)
        with serve(app) as running, running.http() as client:
            yield client
    pool.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_that_a_part_gave_it(
    http: httpx.Client, parted: PrefixManifest, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.headers["x-xkv-artifact"] == parted.id and answer.headers["x-xkv-part"] == "0.5"
    assert '"part":0.5' in answer.text and '"miss":null' in answer.text
    assert "x-xkv-miss" not in answer.headers
    counted = "xkv_engine_from_part_total 1.0"
    wait_until(lambda: counted in http.get("/metrics").text)
    wait_until(lambda: any(" part=0.5 " in record.getMessage() for record in caplog.records))

    def whole() -> bool:
        answer = http.post("/v1/chat/completions", json=CHAT)
        return bool(answer.json()["xkv"]["part"] is None)

    wait_until(whole)
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.headers["x-xkv-artifact"] == parted.id and "x-xkv-part" not in answer.headers


def test_parts_are_offered_for_prompts_that_hold_all_of_the_artifact(
    own_store: ArtifactStore, loaded: LoadedModel, parted: PrefixManifest
) -> None:
    finder = PrefixFinder(own_store, loaded.identity, SETTINGS)
    ids = own_store.load(parted.id, ("tokens",))[1]["tokens"].tolist()
    match, _ = finder._find(array("i", [*ids, 70]), "default")
    assert match is not None and [one.measured for one in match.parts] == [GOOD]
    assert match.nbytes is not None and match.nbytes > match.parts[0].nbytes
    shorter, _ = finder._find(array("i", [*ids[:100], 70, 70]), "default")
    assert shorter is not None and shorter.tokens == 100 and not shorter.parts
    finder.close()


@pytest.mark.parametrize(("kl", "offered"), [(0.0, []), (9e-5, []), (1e-4, [GOOD])])
def test_the_bound_is_the_server_s(
    own_store: ArtifactStore,
    loaded: LoadedModel,
    parted: PrefixManifest,
    kl: float,
    offered: list[PartFidelity],
) -> None:
    settings = APISettings(min_fidelity=0.0, lookup_timeout_s=120.0, part_kl=kl)
    finder = PrefixFinder(own_store, loaded.identity, settings)
    ids = own_store.load(parted.id, ("tokens",))[1]["tokens"].tolist()
    match, _ = finder._find(array("i", [*ids, 70]), "default")
    assert match is not None and [one.measured for one in match.parts] == offered
    finder.close()


@pytest.mark.parametrize("kl", [-1e-9, float("inf"), float("nan")])
def test_a_bound_that_is_none(kl: float) -> None:
    with pytest.raises(InvalidSpec, match="part_kl"):
        APISettings(part_kl=kl)
