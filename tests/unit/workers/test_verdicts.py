"""What is said of stored artifacts' fidelity, by their own limits and by those of stored calibrations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import SPEC, sample
from calibration_samples import calibration

from xkv_artifacts.catalog import ENTRY_KEY
from xkv_artifacts.store import ArtifactStore
from xkv_cli import render
from xkv_workers.inventory import Description, describe
from xkv_workers.verdicts import Verdict, Verdicts

ABSENT = "c" * 64
THRESHOLDS = {"thresholds": [{"ratio": 8.0, "worst": 0.004, "kl": 0.0125}]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


def publish(store: ArtifactStore, *, kl: float, limit: float | None = None, **fields: Any) -> str:
    """One whose top-1 agreement is 0.95; `fields` are the spec's or the manifest's."""
    own = {name: fields.pop(name) for name in ("instead_of", "retried") if name in fields}
    manifest, tensors = sample(spec={**SPEC, **fields})
    measured = {"top1_agreement": 0.95, "kl": kl, "kl_limit": limit}
    fidelity = manifest.fidelity.model_copy(update=measured)
    return store.publish(manifest.model_copy(update={**own, "fidelity": fidelity}), tensors).id


def with_thresholds(store: ArtifactStore, figures: dict[str, Any] = THRESHOLDS) -> str:
    manifest, tensors = calibration()
    return store.calibrations.publish(manifest.model_copy(update={"figures": figures}), tensors).id


def verdicts(store: ArtifactStore, artifact_id: str) -> tuple[Verdict, Verdict]:
    """By the manifest, and by the catalog."""
    listed = Verdicts(store).of_entries(store.entries())
    return describe(store, artifact_id).verdict, listed[artifact_id]


@pytest.mark.parametrize(("kl", "low"), [(0.013, True), (0.0125, False)])
def test_an_artifacts_own_limit_counts(store: ArtifactStore, kl: float, low: bool) -> None:
    made = with_thresholds(store, {"thresholds": [{"ratio": 8.0, "kl": 0.02}]})
    artifact_id = publish(store, kl=kl, limit=0.0125, calibration=made)
    assert verdicts(store, artifact_id) == (Verdict(low, 0.0125),) * 2


@pytest.mark.parametrize(("kl", "low"), [(0.013, True), (0.0125, False)])
def test_without_one_its_calibrations_does(store: ArtifactStore, kl: float, low: bool) -> None:
    artifact_id = publish(store, kl=kl, calibration=with_thresholds(store))
    assert verdicts(store, artifact_id) == (Verdict(low, 0.0125),) * 2
    key = store.catalog._key(ENTRY_KEY, id=artifact_id)  # listed before entries had these
    assert store.catalog.link.call(lambda client: client.hdel(key, "kl", "calibration")) == 2
    assert verdicts(store, artifact_id)[1] == Verdict(low, 0.0125)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"calibration": ABSENT},
        {"calibration": [3]},
        {"calibration": "../x"},
        {"ratio": None},
        {"ratio": "x"},
    ],
)
def test_where_none_says_agreement_does(store: ArtifactStore, spec: dict[str, Any]) -> None:
    made = with_thresholds(store)
    fields = {"calibration": made, **spec} if spec else {}
    artifact_id = publish(store, kl=0.5, **fields)
    assert verdicts(store, artifact_id) == (Verdict(False, None),) * 2


def test_a_calibration_of_damaged_figures_says_nothing(store: ArtifactStore) -> None:
    made = with_thresholds(store, {"thresholds": [{"ratio": "eight"}]})
    assert verdicts(store, publish(store, kl=0.5, calibration=made))[1] == Verdict(False, None)


def test_an_artifact_that_cannot_be_read_has_no_verdict(store: ArtifactStore) -> None:
    artifact_id = publish(store, kl=0.5, calibration=ABSENT)
    store.blobs.remove(artifact_id)
    entries = store.catalog.entries()
    assert [entry.id for entry in entries] == [artifact_id]
    assert Verdicts(store).of_entries(entries) == {}
    assert render.entry_fields(entries[0], None)["low"] is None


def shown(found: Description, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    render.description(found)
    lines = [line.partition("  ") for line in capsys.readouterr().out.splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


@pytest.mark.parametrize(
    ("fields", "verdict", "again"),
    [
        (
            {"kl": 0.013, "limit": 0.0125, "calibration": ABSENT, "instead_of": "e" * 64},
            "low: above 0.0125 nats, the limit of calibration cccccccccccc at 8x",
            "made at 8x instead of artifact eeeeeeeeeeee, whose fidelity was low",
        ),
        (
            {"kl": 0.01, "limit": 0.0125, "calibration": ABSENT, "retried": True},
            "not low: at most 0.0125 nats, the limit of calibration cccccccccccc at 8x",
            "nothing else was better",
        ),
        (
            {"kl": 0.01},
            "not low: at least 90.0 % same next token; no calibration sets a limit",
            None,
        ),
        ({"kl": 0.01, "limit": 0.0, "ratio": "x", "calibration": 3}, "low: above 0.0000 nats", None),
    ],
)
def test_one_line_says_the_verdict(
    store: ArtifactStore,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    verdict: str,
    again: str | None,
) -> None:
    lines = shown(describe(store, publish(store, **fields)), capsys)
    assert lines["verdict"].startswith(verdict)
    assert lines.get("compressed again") == again


def test_low_ones_are_marked_in_the_list(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    artifact_id = publish(store, kl=0.013, limit=0.0125)
    entries = store.entries()
    render.entries(entries, {artifact_id})
    assert "! 95.0 %" in (told := capsys.readouterr().out) and "! low fidelity: answers may be wrong" in told
    render.entries(entries)
    assert "!" not in capsys.readouterr().out
