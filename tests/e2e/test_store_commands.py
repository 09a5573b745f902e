"""`xkv ls`, `show`, `verify`, `rm`, `index rebuild`, `gc` and `doctor` on a real store."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import Xkv


def test_a_store_is_listed_shown_checked_and_cleaned(
    xkv: Xkv, tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    at = ["--store", store]
    for document in corpus.iterdir():
        made = ["--doc", document, "--model", tiny_model, "--ratio", "2", "--max-tokens", "1"]
        assert xkv("ask", *at, *made, "Why?").code == 0

    listed = xkv("ls", *at, "--json").json["artifacts"]
    assert sorted(entry["document"] for entry in listed) == ["a.txt", "b.md", "c.rst"]
    ids = {entry["document"]: entry["id"] for entry in listed}
    assert ids["a.txt"][:12] in xkv("ls", *at).out

    shown = xkv("show", ids["a.txt"][:10], *at, "--json").json
    assert shown["id"] == ids["a.txt"] and shown["document"]["uri"] == "a.txt"
    assert shown["spec"]["ratio"] == 2 and shown["groups"][0]["layers"] == [0, 1, 2, 3]
    assert "tensors" not in shown
    assert "rank K" in xkv("show", ids["a.txt"][:10], *at).out

    blob = next(store.glob(f"prefixes/*/{ids['b.md']}*"))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    verified = xkv("verify", *at, "--json")
    assert verified.code == 1
    assert [fault["id"] for fault in verified.json["faults"]] == [ids["b.md"]]
    told = xkv("verify", *at)
    assert told.code == 1 and ids["b.md"] in told.err and "2 of 3" in told.out
    assert told.err.endswith("hint: remove it with `xkv rm ID` and run xkv precompute again\n")
    assert xkv("verify", ids["a.txt"][:8], ids["c.rst"], *at).code == 0

    assert xkv("rm", ids["b.md"][:8], *at, "--json").json == {"removed": ids["b.md"]}
    assert xkv("rm", ids["b.md"], *at).code == 1
    assert xkv("verify", *at).code == 0

    (store / "tmp" / "left.behind").write_bytes(b"half a blob")
    swept = xkv("gc", "--orphans", *at, "--json").json
    assert swept == {"files": 1, "bytes": 11, "entries_dropped": 0, "blobs_listed": 0, "sums": 0, "tails": 0}
    assert xkv("index", "rebuild", *at, "--json").json == {
        "artifacts": 2,
        "calibrations": 0,
        "failed": 0,
        "faults": [],
    }
    assert "2 artifacts listed" in xkv("index", "rebuild", *at).out


def test_a_file_that_is_gone_is_one_line(
    xkv: Xkv, tiny_model: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is asked; a question about the document has it compressed again."""
    store = tmp_path / "store"
    at = ["--store", store]
    ask = ["ask", *at, "--model", tiny_model, "--max-tokens", "1"]
    about = [*ask, "--doc", corpus / "a.txt", "--ratio", "2", "Why?"]
    assert xkv(*about).code == 0
    (made,) = xkv("ls", *at, "--json").json["artifacts"]
    assert made["missing"] is False and "missing" not in xkv("ls", *at).out
    (blob,) = store.glob("prefixes/*/*.safetensors")
    line = f"artifact {made['id']} is missing: its file is gone from {store}"

    def lose() -> None:
        assert xkv(*about).code == 0
        blob.unlink()

    blob.unlink()
    (listed,) = xkv("ls", *at, "--json").json["artifacts"]
    assert listed["missing"] is True and listed["low"] is None
    table = xkv("ls", *at).out
    assert "  missing  " in table and "missing: the file is gone from the store; `xkv precompute`" in table
    verified = xkv("verify", *at)
    assert verified.code == 1 and f"failed {made['id']}: {line}\n" in verified.err
    asked = xkv(*about)
    assert asked.code == 0 and "compressing" in asked.err
    assert [record.getMessage() for record in caplog.records] == [line]
    for command in (["show", made["id"][:8], *at], [*ask, "--artifact", made["id"][:8], "Why?"]):
        lose()
        done = xkv(*command)
        assert (done.code, done.err) == (1, f"error: {line}\nhint: compute it again\n")
    lose()
    assert xkv("rm", made["id"][:8], *at, "--json").json == {"removed": made["id"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "zz"], "'zz' is not an artifact id"),
        (["show", "0000"], "no artifact begins with 0000"),
        (["rm", "../../etc/passwd"], "is not an artifact id"),
        (["verify", "0" * 64], "0" * 64),
    ],
)
def test_an_id_that_is_none_is_one_line(
    xkv: Xkv, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "store" / "prefixes").mkdir(parents=True)
    done = xkv(*arguments, "--store", tmp_path / "store")
    assert done.code == 1 and expected in done.err
    assert "Traceback" not in done.err and "unexpected" not in done.err


def test_a_store_that_is_not_there_is_not_made_by_looking(xkv: Xkv, tmp_path: Path) -> None:
    done = xkv("ls", "--store", tmp_path / "none")
    assert done.code == 1 and "no store at" in done.err
    assert not (tmp_path / "none").exists()


def test_the_doctor_names_what_is_wrong_and_the_fix(xkv: Xkv, tiny_model: Path, tmp_path: Path) -> None:
    healthy = xkv("doctor", "--store", tmp_path / "store", "--model", tiny_model, "--json")
    assert healthy.code == 0, healthy.out
    checks = {check["name"]: check for check in healthy.json["checks"]}
    assert {"python", "torch", "ray", "device", "store", "free space", "redis", "model"} <= set(checks)

    redis = ["--redis", "redis://127.0.0.1:1/0"]
    ill = xkv("doctor", "--store", "/proc/nowhere", *redis, "--model", tmp_path / "none", "--json")
    assert ill.code == 1 and ill.json["ok"] is False
    failed = {check["name"]: check for check in ill.json["checks"] if check["status"] == "failed"}
    assert set(failed) == {"store", "free space", "redis", "model"}
    assert all(check["fix"] for check in failed.values())
    assert "no folder can be made there" in failed["store"]["fix"]


def test_a_file_is_no_store(xkv: Xkv, tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# A document")
    for place, reason in ((file, "it is a file"), (file / "below", "Not a directory")):
        ill = xkv("doctor", "--store", place, "--json")
        check = next(check for check in ill.json["checks"] if check["name"] == "store")
        assert check["detail"] == f"cannot make a store at {place}: {reason}"
        assert check["fix"] == "a file is in the way; give a folder"
