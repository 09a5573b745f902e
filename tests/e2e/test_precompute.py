"""`xkv precompute` end to end: real Ray, Redis, model and files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import Done, Xkv, words

Precompute = Callable[..., Done]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def precompute(xkv: Xkv, ray_address: str, tiny_model: Path, store: Path) -> Precompute:
    """Run precompute on the shared Ray with the tiny model, at a ratio that short documents can reach."""

    def run(*arguments: object, ray: bool = True) -> Done:
        common: list[object] = ["--model", tiny_model, "--store", store, "--json"]
        common += [] if {"--ratio", "--rank-k"} & set(arguments) else ["--ratio", "2"]
        common += ["--ray-address", ray_address] if ray else []
        return xkv("precompute", "--workers", "1", *common, *arguments)

    return run


def test_a_corpus_is_compressed_once(precompute: Precompute, xkv: Xkv, corpus: Path, store: Path) -> None:
    forecast = precompute("--docs", corpus, "--dry-run", ray=False).json
    first = precompute("--docs", corpus)
    assert first.code == 0, first.err
    report = first.json
    assert list(report) == [
        "documents", "computed", "reused", "failed", "errors", "tokens", "bytes_full", "bytes_stored",
        "ratio", "seconds", "calibration", "artifacts",
    ]  # fmt: skip
    assert (report["documents"], report["computed"], report["reused"], report["failed"]) == (3, 3, 0, 0)
    assert [line["document"] for line in report["artifacts"]] == [
        "corpus/a.txt",
        "corpus/b.md",
        "corpus/c.rst",
    ]
    assert set(report["artifacts"][0]) == {
        "id",
        "document",
        "tokens",
        "bytes",
        "ratio",
        "fidelity",
        "retried",
        "low",
    }
    assert report["bytes_stored"] == sum(path.stat().st_size for path in store.rglob("*.safetensors"))
    assert report["ratio"] == pytest.approx(report["bytes_full"] / report["bytes_stored"], abs=1e-3)
    assert report["ratio"] >= 2 and report["tokens"] > 900
    assert all(0 <= line["fidelity"] <= 1 for line in report["artifacts"])

    promised = {line["document"]: line for line in forecast["plan"]}
    for line in report["artifacts"]:
        assert promised[line["document"]]["id"] == line["id"]
        assert line["bytes"] <= promised[line["document"]]["bytes"] <= line["bytes"] * 1.2 + 4096
    after = precompute("--docs", corpus, "--dry-run", ray=False).json
    assert (after["compute"], after["reuse"], after["tokens"]) == (0, 3, 0)
    assert "measured before" in after["seconds_basis"]

    again = precompute("--docs", corpus).json
    assert (again["computed"], again["reused"]) == (0, 3)
    assert again["artifacts"] == report["artifacts"]

    (corpus / "a.txt").write_text(words(320, seed=9))
    changed = precompute("--docs", corpus).json
    assert (changed["computed"], changed["reused"]) == (1, 2)

    (corpus / "b.md").rename(corpus / "renamed.txt")
    renamed = precompute("--docs", corpus).json
    assert (renamed["computed"], renamed["reused"]) == (0, 3)
    assert "corpus/renamed.txt" in [line["document"] for line in renamed["artifacts"]]

    verified = xkv("verify", "--store", store, "--json")
    assert (verified.code, verified.json) == (
        0,
        {"artifacts": 4, "calibrations": 0, "failed": 0, "faults": []},
    )


def test_artifacts_are_promised_something_as_they_are_published(
    precompute: Precompute, xkv: Xkv, store: Path, tmp_path: Path
) -> None:
    document = tmp_path / "news.txt"
    document.write_text(words(320))

    def kept() -> dict[str, Any]:
        (shown,) = xkv("ls", "--store", store, "--json").json["artifacts"]
        return dict(shown)

    assert precompute("--docs", document, "--pin", "--ttl", "7d").json["computed"] == 1
    assert kept()["pinned"] and abs(kept()["expires"] - time.time() - 7 * 86_400) < 120
    assert precompute("--docs", document, ray=False).json["reused"] == 1
    assert kept()["pinned"] and abs(kept()["expires"] - time.time() - 7 * 86_400) < 120
    assert xkv("unpin", kept()["id"], "--store", store).code == 0
    assert precompute("--docs", document, "--ttl", "1h", ray=False).json["reused"] == 1
    assert not kept()["pinned"] and abs(kept()["expires"] - time.time() - 3600) < 120
    for value, said in (
        ("soon", "'soon' is not a time: write 90s, 15m, 12h or 7d"),
        ("none", "'none' is not a time"),
        ("0s", "a time to live of 0 s is not allowed: give more than 0 s, at most 100 years"),
    ):
        done = precompute("--docs", document, "--ttl", value, ray=False)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_bad_documents_are_told_and_two_workers_share_the_others(
    precompute: Precompute, corpus: Path, tmp_path: Path
) -> None:
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "blank.txt").write_bytes(b" \n ")
    for number in range(4):
        (corpus / f"more{number}.txt").write_text(words(900, seed=20 + number))
    (corpus / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (corpus / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (corpus / "long.txt").write_text(words(3000))
    (corpus / "short.txt").write_text("too short for any ratio")
    (corpus / "copy.txt").write_text((corpus / "a.txt").read_text())
    (corpus / "lines.jsonl").write_text('{"id": "good", "text": "' + "word " * 60 + '"}\nnot json\n')
    (tmp_path / "secret.txt").write_text("secret")
    (corpus / "link.txt").symlink_to(tmp_path / "secret.txt")
    done = precompute("--docs", corpus, "--workers", "2")
    assert done.code == 1
    report = done.json
    reasons = {error["document"]: error["reason"] for error in report["errors"]}
    expected = {
        "corpus/empty.txt": "empty",
        "corpus/blank.txt": "empty",
        "corpus/binary.txt": "binary data",
        "corpus/latin.txt": "not UTF-8",
        "corpus/long.txt": "too long",
        "corpus/short.txt": "are too few for any ratio",
        "corpus/lines.jsonl#line 2": "not JSON",
        "corpus/link.txt": "symbolic link out of the corpus",
    }
    assert set(reasons) == set(expected)
    for document, reason in expected.items():
        assert reason in reasons[document]
    assert (report["documents"], report["computed"], report["reused"], report["failed"]) == (17, 8, 1, 8)


def test_several_kinds_of_input_at_once(precompute: Precompute, corpus: Path) -> None:
    inputs = [corpus / "a.txt", corpus / "b.md", "--docs", corpus / "c.rst"]
    done = precompute("--docs", *inputs, "--dry-run", ray=False)
    assert done.code == 0
    assert [line["document"] for line in done.json["plan"]] == ["a.txt", "b.md", "c.rst"]


def test_dry_run_says_what_would_be_done_and_does_nothing(
    precompute: Precompute, corpus: Path, store: Path
) -> None:
    (corpus / "copy.txt").write_text((corpus / "a.txt").read_text())
    done = precompute("--docs", corpus, "--dry-run", ray=False)
    assert done.code == 0
    forecast = done.json
    assert (forecast["documents"], forecast["compute"], forecast["reuse"], forecast["failed"]) == (4, 3, 1, 0)
    assert "rough guess" in forecast["seconds_basis"]
    assert list(store.rglob("*.safetensors")) == []


def test_what_shapes_an_artifact_shapes_its_id(precompute: Precompute, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Answer from the document.")
    a = corpus / "a.txt"
    variants: list[list[object]] = [
        [],
        ["--template", "raw"],
        ["--system-prompt", tmp_path / "system.txt"],
        ["--namespace", "team.b"],
        ["--group-size", "2"],
    ]
    ids = set()
    for variant in variants:
        plan = precompute("--docs", a, "--dry-run", *variant, ray=False).json["plan"]
        ids.add(plan[0]["id"])
    assert len(ids) == len(variants)


def test_what_every_document_would_fail_of_is_told_once(
    xkv: Xkv, corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for files, reason in (
        (("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (("chat_template.jinja",), "no chat template"),
    ):
        model = shutil.copytree(tiny_model, tmp_path / files[0])
        for name in files:
            (model / name).unlink()
        done = xkv("precompute", "--docs", corpus, "--model", model, "--store", tmp_path / "s", "--dry-run")
        assert (done.code, done.out) == (1, "")
        assert reason in done.err.splitlines()[0] and len(done.err.splitlines()) == 2, done.err


def test_min_fidelity_publishes_nothing_below(precompute: Precompute, corpus: Path, store: Path) -> None:
    done = precompute("--docs", corpus, "--min-fidelity", "1", "--rank-k", "1", "--rank-v", "1")
    report = done.json
    published = len(list(store.rglob("*.safetensors")))
    assert published == report["computed"] == sum(line["fidelity"] == 1 for line in report["artifacts"])
    assert report["failed"] > 0 and done.code == 1, "a random model at 8x should not agree everywhere"
    assert all("below 1" in error["reason"] for error in report["errors"])


def test_min_fidelity_holds_for_what_is_stored_already(precompute: Precompute, corpus: Path) -> None:
    arguments = ["--docs", corpus, "--rank-k", "1", "--rank-v", "1"]
    stored = precompute(*arguments).json["artifacts"]
    low = {line["document"] for line in stored if line["fidelity"] < 1}
    assert low, "a random model at 8x should not agree everywhere"
    foreseen = precompute(*arguments, "--min-fidelity", "1", "--dry-run", ray=False).json
    done = precompute(*arguments, "--min-fidelity", "1")
    assert done.code == 1
    for told in (foreseen, done.json):
        assert {error["document"] for error in told["errors"]} == low
        assert all("stored already with fidelity" in error["reason"] for error in told["errors"])
    assert (foreseen["compute"], done.json["computed"]) == (0, 0)
    assert foreseen["reuse"] == done.json["reused"] == len(stored) - len(low)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--model", "no/such-model"], 1, "no/such-model"),
        (["--rank-k", "5000", "--rank-v", "5000"], 1, "rank_k=5000 is larger than"),
        (["--namespace", "../etc"], 2, "namespace '../etc' is not allowed"),
        (["--rank-k", "8"], 2, "--rank-k and --rank-v go together"),
        (["--ratio", "0.5"], 2, "ratio=0.5 is out of range"),
        (["--group-size", "0"], 2, "--group-size=0 is out of range"),
        (["--redis", "redis://127.0.0.1:1/0"], 1, "does not answer"),
        (["--redis", "http://x"], 1, "not a Redis URL"),
        (["--ray-address", "127.0.0.1:1"], 1, "Ray does not start at 127.0.0.1:1: nothing answers"),
        (["--ray-address", "nonsense"], 1, 'neither "host:port" nor "auto"'),
        (["--store", "/proc/nowhere"], 1, "/proc/nowhere"),
        (["--device", "cuda"], 1, "GPU"),
    ],
)
def test_what_cannot_work_is_one_line_with_a_hint(
    xkv: Xkv, tiny_model: Path, corpus: Path, store: Path, arguments: list[str], code: int, expected: str
) -> None:
    common = ["precompute", "--docs", corpus, "--model", tiny_model, "--store", store]
    if "--rank-k" not in arguments and "--ratio" not in arguments:
        common += ["--ratio", "2"]
    done = xkv(*common, *arguments)
    assert done.code == code, done
    assert expected in done.err and "Traceback" not in done.err and "unexpected" not in done.err
    assert done.err.count("\n") <= 6
