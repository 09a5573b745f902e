"""`xkv calibrations ls`, `show` and `rm`, and what the commands of the whole store do with calibrations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from calibration_figures import calibration_figures
from calibration_samples import FINGERPRINT, SETTINGS, calibration
from command_runs import Xkv

from xkv_artifacts.store import ArtifactStore


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, str, str]:
    """A store, and the ids of an older and a newer calibration in it."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        ids = [store.calibrations.publish(*calibration(seed=seed, hours=seed)).id for seed in (0, 1)]
    return tmp_path / "store", ids[0], ids[1]


def test_calibrations_are_listed_newest_first(xkv: Xkv, two: tuple[Path, str, str]) -> None:
    store, old, new = two
    listed = xkv("calibrations", "ls", "--store", store, "--json").json["calibrations"]
    assert [entry["id"] for entry in listed] == [new, old]
    assert {"model": "tiny", "documents": 2, "tokens": 80, "groups": 2}.items() <= listed[0].items()
    shown = xkv("calibrations", "ls", "--store", store).out
    assert shown.index(new[:12]) < shown.index(old[:12]) and new not in shown and "KiB" in shown


def test_one_is_shown_by_its_first_digits(xkv: Xkv, two: tuple[Path, str, str]) -> None:
    store, _, new = two
    shown = xkv("calibrations", "show", new[:10], "--store", store, "--json").json
    assert shown["id"] == new and shown["model"]["fingerprint"] == FINGERPRINT
    assert shown["settings"] == SETTINGS and shown["groups"] == [[0, 1], [2, 3]]
    assert shown["figures"] == {"seconds": 1.5, "kept": "all"}
    assert "tensors" not in shown and shown["bytes"] > 1000
    out = xkv("calibrations", "show", new[:10], "--store", store).out
    assert (
        "2 documents, 80 tokens" in out
        and "0-1, 2-3" in out
        and "group size 2; ridge 0.5" in out
        and "1.5" in out
    )


def test_one_is_drawn_as_a_page_and_as_pictures(xkv: Xkv, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    manifest, tensors = calibration()
    measured = manifest.model_copy(update={"figures": calibration_figures()})
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = store.calibrations.publish(measured, tensors).id
    out = xkv("calibrations", "show", made[:10], "--store", tmp_path / "store").out
    shown = [" ".join(line.split()) for line in out.splitlines()]
    assert "20x calibrated bases, bits 0.0000 100.0 % 100.0 %" in shown
    assert not any(line.startswith("20x recipe") for line in shown)
    page, plots = tmp_path / "page.html", tmp_path / "plots"
    show = ["calibrations", "show", made[:10], "--store", tmp_path / "store"]
    done = xkv(*show, "--report", page, "--plots", plots)
    assert done.code == 0 and made in done.out, done
    assert "What each decision gained" in page.read_text() and "At 20x compression" in page.read_text()
    pictures = sorted(plots.iterdir())
    assert {one.suffix for one in pictures} == {".png"} and "likeness-key.png" in [
        one.name for one in pictures
    ]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)


@pytest.mark.parametrize("plots", ["/proc/plots", "no/such/folder", __file__])
def test_pictures_that_cannot_be_written_are_one_line(
    xkv: Xkv, two: tuple[Path, str, str], plots: str
) -> None:
    done = xkv("calibrations", "show", two[1], "--store", two[0], "--plots", plots)
    assert done.code == 2 and plots in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_pictures_without_matplotlib_are_refused_before_anything_is_done(
    xkv: Xkv, two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = xkv("calibrations", "show", two[1], "--store", two[0], "--plots", tmp_path / "plots")
    assert done.code == 1 and done.out == "" and "xkv-service[plot]" in done.err


def test_one_is_removed(xkv: Xkv, two: tuple[Path, str, str]) -> None:
    store, old, new = two
    assert xkv("calibrations", "rm", old[:10], "--store", store, "--json").json == {"removed": old}
    again = xkv("calibrations", "rm", old, "--store", store)
    assert again.code == 1 and f"calibration {old} is not in" in again.err
    listed = xkv("calibrations", "ls", "--store", store, "--json").json["calibrations"]
    assert [entry["id"] for entry in listed] == [new]


def test_the_whole_store_is_checked_cleaned_and_listed_again(xkv: Xkv, two: tuple[Path, str, str]) -> None:
    store, old, new = two
    at = ["--store", store]
    assert xkv("verify", *at, "--json").json["calibrations"] == 2
    blob = store / "calibrations" / old[:2] / f"{old}.safetensors"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    verified = xkv("verify", *at, "--json")
    assert verified.code == 1 and verified.json["artifacts"] == 0
    assert [fault["id"] for fault in verified.json["faults"]] == [old]
    told = xkv("verify", *at)
    assert told.code == 1 and told.out == "1 of 2 calibrations are as written\n"
    assert told.err.endswith("remove it with `xkv calibrations rm ID` and run xkv calibrate again\n")
    assert xkv("verify", new[:10], *at).code == 0
    blob.unlink()
    assert xkv("gc", "--orphans", *at, "--json").json["entries_dropped"] == 1
    rebuilt = xkv("index", "rebuild", *at, "--json").json
    assert (rebuilt["artifacts"], rebuilt["calibrations"], rebuilt["failed"]) == (0, 1, 0)
    assert "1 calibration listed" in xkv("index", "rebuild", *at).out


@pytest.mark.parametrize("command", ["show", "rm"])
@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ("zz", "'zz' is not a calibration id"),
        ("0000", "no calibration begins with 0000"),
        ("../../etc/passwd", "is not a calibration id"),
        ("0" * 64, "0" * 64),
    ],
)
def test_an_id_that_is_none_is_one_line(
    xkv: Xkv, two: tuple[Path, str, str], command: str, identity: str, expected: str
) -> None:
    done = xkv("calibrations", command, identity, "--store", two[0])
    assert done.code == 1 and expected in done.err
    assert "Traceback" not in done.err and "unexpected" not in done.err
