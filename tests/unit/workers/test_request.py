"""What a run may be asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xkv_artifacts.errors import InvalidLimits, InvalidNamespace
from xkv_service.errors import InvalidSpec
from xkv_workers.errors import CorpusError
from xkv_workers.request import Request


def create(**fields: Any) -> Request:
    return Request.create(**{"paths": (Path("docs"),), "store_url": "store", **fields})


def test_the_default_is_a_ratio_of_eight() -> None:
    assert create().compression.spec(None).ratio == 8
    assert create(rank_k=384, rank_v="full").compression.rank_v == "full"


@pytest.mark.parametrize(
    "fields", [{"ratio": 0.5}, {"rank_k": 3}, {"ratio": 8.0, "rank_k": 3, "rank_v": 4}, {"group_size": 0}]
)
def test_settings_that_no_run_can_have_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        create(**fields)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("inf"), 1e12])
def test_a_time_to_live_is_some_seconds(ttl_s: float) -> None:
    assert create(pin=True, ttl_s=0.5).ttl_s == 0.5
    with pytest.raises(InvalidLimits, match="time to live"):
        create(ttl_s=ttl_s)


@pytest.mark.parametrize("namespace", ["../x", "", "a/b", "a b", "..", "\x00"])
def test_namespaces_are_names(namespace: str) -> None:
    with pytest.raises(InvalidNamespace):
        create(namespace=namespace)


def test_a_system_prompt_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Be brief.\n")
    assert create(system_prompt=path).system_prompt == "Be brief.\n"
    for content in (b"", b" \n", b"\xff", b"a\0b", b"x" * (2**20 + 1)):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="system prompt"):
            create(system_prompt=path)
    with pytest.raises(CorpusError, match="cannot be read"):
        create(system_prompt=tmp_path / "missing")
