"""`xkv pin`, `unpin`, `ttl` and `gc` on a real store."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from artifact_samples import sample, tail_sample
from command_runs import Xkv

from xkv_artifacts.store import ArtifactStore


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """A store of three artifacts, two of them in the namespace acme."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        names = ("default", "acme", "acme")
        return [
            store.publish(*sample(range(100 * number), namespace=name)).id
            for number, name in enumerate(names, start=1)
        ]


def test_artifacts_are_kept_and_collected_as_told(xkv: Xkv, tmp_path: Path, ids: list[str]) -> None:
    at = ["--store", tmp_path / "store"]
    first, second, third = ids
    assert xkv("pin", first[:8], *at, "--json").json == {"id": first, "pinned": True, "expires": None}
    assert xkv("ttl", first[:8], "7d", *at).out.startswith(f"{first}: pinned; without the pin it ends 20")
    ends = xkv("ttl", second, "3600s", *at, "--json").json["expires"]
    assert abs(ends - time.time() - 3600) < 600
    shown = xkv("show", first[:8], *at, "--json").json
    assert shown["pinned"] is True and abs(shown["expires"] - time.time() - 7 * 86_400) < 600
    listed = xkv("ls", *at, "--json").json["artifacts"]
    assert {item["id"]: item["pinned"] for item in listed} == {first: True, second: False, third: False}
    assert "pinned" in xkv("ls", *at).out and "to 20" in xkv("ls", *at).out
    assert xkv("ttl", second, "0.1s", *at).code == 0
    time.sleep(0.2)

    said = xkv("gc", "--budget", "10kB", "--dry-run", *at, "--json")
    assert said.code == 1 and said.json["dry_run"] is True
    assert [(item["id"], item["reason"]) for item in said.json["artifacts"]] == [(second, "expired")]
    assert [item["untouched"] for item in said.json["excess"]] == [True], "the pinned one is larger by itself"
    assert "of pinned artifacts" in xkv("gc", "--budget", "10kB", "--dry-run", *at).err
    done = xkv("gc", *at)
    assert done.code == 0 and "1 artifact deleted" in done.out and "had ended" in done.out
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"namespaces": {"acme": {"artifacts": 0}}}))
    collected = xkv("gc", "--limits", limits, *at, "--json").json
    assert [(item["id"], item["reason"]) for item in collected["artifacts"]] == [(third, "quota")]
    assert collected["excess"] == [] and collected["stored"] == collected_size(tmp_path / "store")

    assert xkv("unpin", first, *at, "--json").json["pinned"] is False
    assert xkv("ttl", first, "none", *at).out == f"{first}: kept until the store is full\n"
    assert xkv("gc", "--budget", "0", *at, "--json").json["removed"] == 1
    assert xkv("ls", *at, "--json").json == {"artifacts": [], "stored_tails": {"tails": 0, "bytes": 0}}


def test_stored_tails_are_told_and_collected(xkv: Xkv, tmp_path: Path) -> None:
    at = ["--store", tmp_path / "store"]
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        for start, ttl_s in ((0, 0.01), (1, 600.0)):
            store.tails.put(*tail_sample(range(start, start + 200)), "acme", ttl_s=ttl_s, budget=1 << 20)
        size = store.tails.usage().bytes // 2
        time.sleep(0.1)
        two, one = {"tails": 2, "bytes": 2 * size}, {"tails": 1, "bytes": size}
        assert xkv("ls", *at, "--json").json["stored_tails"] == two
        assert "stored tails of conversations: 2 (" in xkv("ls", *at).out
        tails = {"removed": 1, "bytes": size, "left": 2, "left_bytes": 2 * size}
        assert xkv("gc", "--dry-run", *at, "--json").json["stored_tails"] == tails
        done = xkv("gc", *at)
        assert done.code == 0 and "1 stored tail deleted" in done.out
        assert xkv("ls", *at, "--json").json["stored_tails"] == one


def collected_size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.glob("prefixes/*/*"))


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["gc", "--budget", "lots"], 2, "'lots' is not a size"),
        (["gc", "--orphans", "--dry-run"], 2, "--orphans deletes no artifact"),
        (["gc", "--limits", "/nowhere"], 2, "does not exist"),
        (["gc", "--limits", __file__], 1, "the file: Invalid JSON"),
        (["ttl", "0000", "soon"], 2, "'soon' is not a time"),
        (["ttl", "0" * 64, "5s"], 1, f"artifact {'0' * 64} is not in"),
        (["pin", "zz"], 1, "'zz' is not an artifact id"),
        (["unpin", "0" * 64], 1, f"artifact {'0' * 64} is not in"),
    ],
)
def test_what_cannot_be_is_one_line(
    xkv: Xkv, tmp_path: Path, arguments: list[str], code: int, expected: str
) -> None:
    (tmp_path / "store" / "prefixes").mkdir(parents=True)
    done = xkv(*arguments, "--store", tmp_path / "store")
    assert done.code == code and expected in done.err and "Traceback" not in done.err
