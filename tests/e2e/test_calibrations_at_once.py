"""Two `xkv calibrate` at once in one store, one of them killed before: each makes what it makes alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from command_runs import Xkv, words

from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_artifacts.store import ArtifactStore

_SOME_TIME = datetime(2026, 11, 26, tzinfo=timezone.utc)


def start(command: list[object]) -> subprocess.Popen[str]:
    """`xkv` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "xkv_cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when_something_is_observed(run: subprocess.Popen[str], store: Path) -> None:
    while run.poll() is None and not list(store.glob("calibrating/*/*")):
        time.sleep(0.005)
    run.kill()
    _, err = run.communicate(timeout=600)
    assert run.returncode == -signal.SIGKILL, err


def made_in(store: Path) -> dict[str, CalibrationManifest]:
    """By id, every calibration in a store, every byte checked, but for when it was made."""
    with ArtifactStore.open(str(store)) as opened:
        found = [opened.calibrations.load(entry.id)[0] for entry in opened.calibrations.entries()]
    return {one.id: one.model_copy(update={"created": _SOME_TIME}) for one in found}


@pytest.mark.slow
@pytest.mark.long
def test_two_at_once_make_what_each_makes_alone(
    xkv: Xkv, ray_address: str, tiny_model: Path, tmp_path: Path
) -> None:
    def command(sample: str, store: str) -> list[object]:
        at = ["--docs", tmp_path / sample, "--store", tmp_path / store, "--model", tiny_model]
        return ["calibrate", *at, "--ratio", "2", "--ray-address", ray_address, "--workers", "1", "--json"]

    for first, sample in ((0, "one"), (10, "other")):
        (tmp_path / sample).mkdir()
        for number in range(4):
            (tmp_path / sample / f"{number}.txt").write_text(words(400, seed=first + number))

    killed = start(command("one", "both"))
    kill_when_something_is_observed(killed, tmp_path / "both")
    again = start(command("one", "both"))
    other = xkv(*command("other", "both")).json
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    one = json.loads(out)
    assert "of 3 documents were observed before" in err
    assert (one["documents"], one["held_out"]) == (other["documents"], other["held_out"]) == (4, 1)
    assert list((tmp_path / "both").glob("calibrating/*/*")) == []

    alone = [xkv(*command(sample, "alone")).json["id"] for sample in ("one", "other")]
    assert [one["id"], other["id"]] == alone and alone[0] != alone[1]
    assert made_in(tmp_path / "both") == made_in(tmp_path / "alone")
