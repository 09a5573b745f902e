"""`xkv calibrate` end to end: a calibration is made, found by the other commands, and survives a kill."""

from __future__ import annotations

import json
import random
import re
from html import unescape
from pathlib import Path

import pytest
from command_runs import Xkv, words

from xkv_artifacts.calibration_format import read_manifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.limits import ENOUGH
from xkv_service.calibration.steps import SHARED
from xkv_service.calibration.storage import known_documents
from xkv_service.demo import demo_calibration_path

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENTS = (
    "rules-nagoya-open-swan-foundation.md",
    "bulletin-houston-lucky-dove-society.txt",
    "index-tokyo-orange-crow-council.md",
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A question about each document."""
    folder = tmp_path / "questions"
    folder.mkdir()
    for document in DOCUMENTS:
        name = f"{Path(document).stem}.questions.jsonl"
        lines = (EXAMPLES / "questions" / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(lines[0])
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_a_model_is_calibrated_and_documents_are_compressed_with_it(
    xkv: Xkv, ray_address: str, questions: Path, tmp_path: Path
) -> None:
    paths = [EXAMPLES / "corpus" / name for name in DOCUMENTS]
    at = ["--store", tmp_path / "store"]
    ray = ["--ray-address", ray_address]
    made = xkv("calibrate", "--docs", *paths, "--questions", questions, *at, *ray, "--workers", "2", "--json")
    assert made.code == 0, made.err
    result = made.json
    assert list(result) == [
        "id", "model", "documents", "held_out", "tokens", "replaced", "errors", "seconds", "figures"
    ]  # fmt: skip
    assert (result["documents"], result["held_out"], result["errors"]) == (3, 1, [])
    with demo_calibration_path().open("rb") as file:
        assert result["replaced"] == read_manifest(file).id
    assert 0.9 < result["figures"]["stability"]["kept"]["mean"] <= 1
    assert {row["asked"] for row in result["figures"]["validation"]} == {8, 20, 32, 48}
    (row,) = (one for one in result["figures"]["validation"] if (one["asked"], one["step"]) == (8, SHARED))
    assert (row["questions"], row["answers_exact"], row["answers"]) == (1, 1.0, 1.0)
    assert list((tmp_path / "store" / "calibrating").rglob("*.safetensors")) == []

    compress = ["precompute", "--docs", paths[1], "--ratio", "20", *at, *ray, "--workers", "1", "--json"]
    first, again = xkv(*compress).json, xkv(*compress).json
    assert first["calibration"] == again["calibration"] == result["id"]
    assert (first["computed"], again["computed"], again["reused"]) == (1, 0, 1), first
    assert first["ratio"] > 19
    asked = json.loads((questions / f"{paths[1].stem}.questions.jsonl").read_text().splitlines()[0])
    answered = xkv("ask", "--doc", paths[1], *at, asked["question"], "--json").json
    assert answered["answer"] == asked["answer"]
    assert answered["artifact"] == first["artifacts"][0]["id"]


def test_what_fails_is_reported_and_the_others_go_on(
    xkv: Xkv, ray_address: str, tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    command = ["calibrate", "--model", tiny_model, "--store", tmp_path / "store", "--ratio", "2"]
    command += ["--ray-address", ray_address, "--workers", "1"]
    for name, letters in (("a.txt", "0123456789"), ("b.md", "abcdefghij"), ("c.rst", "KLMNOPQRST")):
        (corpus / name).write_text("".join(random.Random(name).choices(letters, k=500)))
    (corpus / "copy.txt").write_text((corpus / "a.txt").read_text())
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "long.txt").write_text(words(3000))
    done = xkv(*command, "--docs", corpus, "--plots", tmp_path / "plots")
    assert done.code == 1, done
    assert (tmp_path / "plots" / "plan-2.png").exists()
    assert "failed corpus/empty.txt: empty" in done.err and "failed corpus/long.txt: too long" in done.err
    shown = " ".join(done.out.split())
    assert "documents 3, 1 of them only to check it on" in shown and "2x" in shown
    assert "index every layer: no document held out is long enough" in shown
    listed = xkv("calibrations", "ls", "--store", tmp_path / "store", "--json").json["calibrations"]
    assert [(entry["model"], entry["documents"]) for entry in listed] == [("tiny", 3)]

    assert "drawn again 20 times, from 2 parts of 2 documents" in shown
    page = tmp_path / "page.html"
    show = ["calibrations", "show", listed[0]["id"][:8], "--store", tmp_path / "store"]
    again = xkv(*show, "--report", page)
    assert again.code == 0
    said = [line for line in done.err.splitlines() if line.startswith("warning ")]
    out = " ".join(again.out.split())
    assert "settings ratio 2; ratios 2, 8, 20, 32, 48; group size 4" in out
    assert not re.search(r"[\[\]{}=]", out) and "None" not in out
    assert "index every layer: no document held out" in out
    assert [line for line in again.err.splitlines() if line.startswith("warning ")] == said
    held, parts, energy, divergence = said
    assert "Held out to check on: 1 document, 3 is the least" in held
    assert "can be drawn again from: 2, 4 is the least" in parts
    kept = re.search(r"keep ([\d.]+) % .* of the energy", energy)
    assert kept is not None and float(kept[1]) < 100 * ENOUGH and "98.0 % is enough" in energy
    assert "more than 0.02 nats" in divergence and re.search(r" 8x \(0?[\d.]+\)", divergence)
    shown_there = unescape(page.read_text())
    assert all(line.removeprefix("warning ") in shown_there for line in said)

    few = xkv(*command, "--docs", corpus / "a.txt", corpus / "long.txt")
    assert few.code == 1 and "usable documents: 1; a calibration needs two" in few.err
    assert "hint: long.txt: too long" in few.err
    far = xkv(*command, "--docs", corpus, "--ratio", "999")
    assert far.code == 1 and "no document held out can be compressed at 999x: the longest" in far.err
    assert (
        "observed" not in far.err and list((tmp_path / "store" / "calibrating").rglob("*.safetensors")) == []
    )
    (tmp_path / "none").mkdir()
    unasked = xkv(*command, "--docs", corpus, "--questions", tmp_path / "none")
    assert unasked.code == 1 and "has no questions about any document" in unasked.err
    assert xkv(*command, "--docs", corpus, "--ratio", "0.5").code == 2


def test_documents_are_added_to_an_earlier_calibration(
    xkv: Xkv, ray_address: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The sums of both samples are those of all documents observed at once; their text is not needed."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for document in range(3):
            (folder / f"{document}.txt").write_text(words(400, seed=10 * number + document))
    command = ["calibrate", "--store", tmp_path / "store", "--ratio", "2", "--model", tiny_model]
    command += ["--ray-address", ray_address, "--workers", "1", "--json"]
    first = xkv(*command, "--docs", folders[0]).json
    made = xkv(*command, "--docs", folders[1], "--from", first["id"][:8])
    assert made.code == 0, made.err
    second = made.json
    assert f"2 documents observed, 2 more by calibration {first['id'][:12]}" in made.err
    assert second["id"] != first["id"] and second["held_out"] == 1
    assert (first["replaced"], second["replaced"]) == (None, first["id"])
    sample = second["figures"]["sample"]
    assert (sample["documents"], sample["known"]) == (4, 2)
    assert sample["tokens"] > first["figures"]["sample"]["tokens"]
    assert second["figures"]["settings"]["earlier"] == first["id"]
    assert second["figures"]["stability"]["documents"] == 2
    shown = xkv("calibrations", "show", second["id"][:8], "--store", tmp_path / "store")
    assert "drawn again" in shown.out and "2 parts of 2 documents" in shown.out

    with ArtifactStore.open(str(tmp_path / "store")) as store:
        known = known_documents(store, second["id"])
        assert len(known) == 4 and known > known_documents(store, first["id"])

    first, other = folders[1] / "0.txt", tmp_path / "other.txt"
    other.write_text(words(400, seed=77))
    one = xkv(*command, "--docs", first, other, "--from", second["id"])
    assert one.code == 0 and one.json["figures"]["stability"] is None
    warned = " ".join(one.json["figures"]["warnings"])
    assert "drawn again from: 0 beside 4 of the earlier calibration, which cannot" in warned
    assert "two documents" not in warned and "is is" not in warned
    alone = xkv(*command, "--docs", other, "--from", second["id"])
    assert alone.code == 1 and "usable documents: 1; a calibration needs two, with --from too" in alone.err

    seen = xkv(*command, "--docs", folders[1] / "0.txt", folders[1] / "1.txt", "--from", second["id"])
    assert seen.code == 1 and "every document of the sample is in the earlier calibration" in seen.err
    assert xkv(*command, "--docs", folders[1], "--from", "0000").code == 1
