"""What the traffic benchmark says of memory and of damaged blobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import sample

from benchmarks.traffic_damage import Damage, met
from benchmarks.traffic_memory import by_minute, early_and_late, growth
from xkv_artifacts.errors import CorruptArtifact, MissingBlob
from xkv_artifacts.store import ArtifactStore


def test_growth_is_that_of_the_second_half() -> None:
    dice = random.Random(0)
    seconds = [5.0 * number for number in range(120)]
    filling = [min(100.0 + second, 400.0) for second in seconds]  # full after 300 of 600 s
    flat = [(at, held + 50, held + dice.uniform(-2, 2)) for at, held in zip(seconds, filling, strict=True)]
    leaking = [(at, held, held + 6 * at / 60) for at, held, _ in flat]
    one, other = growth({"engine": flat, "ingress": leaking, "too short": flat[:3]})
    assert one["part"] == "engine" and abs(one["mib_a_minute"]) < 4 * one["error"] < 0.5
    assert other["mib_a_minute"] == pytest.approx(6.0, abs=0.1)
    assert early_and_late(flat) == {"mib_early": pytest.approx(372.5, abs=3), "mib_late": 450.0}
    minutes = by_minute({"engine": flat})["engine"]
    assert len(minutes) == 10 and minutes[-1] == pytest.approx(400, abs=1)


def test_damage_is_followed_until_it_is_mended(tmp_path: Path) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = [store.publish(*sample(range(40 + rank), uri=f"{rank}.txt")).id for rank in range(40)]
        damage = Damage(tmp_path / "store")
        damage.strike()
        assert damage.ids == made[:2]
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 0, "blobs_remade": 0}
        with pytest.raises(CorruptArtifact):
            store.load(made[0])
        store.publish(*sample(range(40), uri="0.txt"))
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 1, "blobs_remade": 1}


def test_a_loss_is_followed_until_it_is_mended(tmp_path: Path) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = [store.publish(*sample(range(40 + rank), uri=f"{rank}.txt")).id for rank in range(40)]
        damage = Damage(tmp_path / "store")
        damage.strike(missing=True)
        assert damage.ids == made[:2]
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 0, "blobs_remade": 0}
        with pytest.raises(MissingBlob):
            store.load(made[0])
        store.publish(*sample(range(40), uri="0.txt"))
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 1, "blobs_remade": 1}


def test_who_met_damage_was_told_so() -> None:
    def answer(reason: str | None, **fields: Any) -> dict[str, Any]:
        return {"end": "answered", "xkv": {"miss": reason and {"reason": reason}}, **fields}

    answers = [
        answer("corrupt", right=True),
        answer("missing", right=False),
        answer("no_room", right=True),
        answer(None, right=True),
        {"end": "left"},
    ]
    assert met(answers) == {"met_damage": 2, "met_and_right": 1}
