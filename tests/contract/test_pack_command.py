"""`xkv pack` on a real store with a real Redis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from artifact_samples import sample
from click.testing import CliRunner
from redis_server import RedisServer

from xkv_artifacts.store import ArtifactStore
from xkv_cli.main import xkv


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(xkv, [*arguments, "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_cold_artifacts_are_packed_listed_by_what_they_take_and_unpacked(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    at = "--store", str(tmp_path), "--redis", redis_server.url
    with ArtifactStore.open(str(tmp_path), redis_server.url) as store:
        (old, tensors), (new, other) = sample(), sample(range(7, 90))
        store.publish(old, tensors)
        store.publish(new, other)
        store.rebuild()  # knows nothing of its use: last used when it was created, days ago
        store.load(new.id)
    plain = {one["id"]: one["bytes"] for one in run("ls", *at)["artifacts"]}
    packed = run("pack", "--unused-days", "1", *at)
    assert packed["changed"] == 1 and packed["bytes_before"] == plain[old.id]
    listed = {one["id"]: one["bytes"] for one in run("ls", *at)["artifacts"]}
    assert listed == {old.id: packed["bytes_after"], new.id: plain[new.id]}
    assert packed["bytes_after"] < packed["bytes_before"]
    assert run("verify", *at)["failed"] == 0
    with ArtifactStore.open(str(tmp_path), redis_server.url) as store:
        assert torch.equal(store.load(old.id)[1]["tokens"], tensors["tokens"])
    assert run("pack", old.id[:10], *at)["changed"] == 0
    assert run("pack", old.id[:10], "--undo", *at)["bytes_after"] == plain[old.id]
    assert {one["id"]: one["bytes"] for one in run("ls", *at)["artifacts"]} == plain
