"""Blobs that are damaged or lost under a server that has users, and what became of them and of who asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xkv_artifacts.store import ArtifactStore

_SHARE = 20
_PATIENCE_S = 60.0
_FOUND = ("xkv_verification_failures_total", "xkv_missing_blobs_total")
_ASKED = ("xkv_engine_remakes_asked_total", "xkv_lookup_remakes_asked_total")


class Damage:
    """One blob in twenty, at least one, of the documents asked about most.

    Args:
        store: the folder of the store; its documents are called by their rank.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._missing = False
        self.ids: list[str] = []

    def strike(self, *, missing: bool = False) -> None:
        """Flip a byte of each, in its factors, or remove its file. Who asks when it has left memory meets
        it.
        """
        self._missing = missing
        with ArtifactStore.open(str(self._store)) as opened:
            by_rank = sorted(opened.entries(), key=lambda entry: int(Path(entry.document).stem))
        for entry in by_rank[: max(1, len(by_rank) // _SHARE)]:
            (path,) = self._store.glob(f"prefixes/*/{entry.id}.safetensors")
            path.unlink() if missing else _flip(path)
            self.ids.append(entry.id)

    def mended(self) -> dict[str, int]:
        """Wait for what was found to be stored again: how many were damaged, found, and are whole again."""
        with ArtifactStore.open(str(self._store)) as opened:
            found = [name for name in self.ids if self._found(opened, name)]
            end = time.monotonic() + _PATIENCE_S
            while not all(map(opened.blobs.exists, found)) and time.monotonic() < end:
                time.sleep(0.2)
            whole = [one.artifact_id for one in opened.verify(found) if one.fault is None]
        return {"blobs_damaged": len(self.ids), "blobs_found": len(found), "blobs_remade": len(whole)}

    def _found(self, opened: ArtifactStore, name: str) -> bool:
        """What is damaged goes to quarantine; what is missing is not listed, until it is stored again."""
        if self._missing:
            return opened.blobs.exists(name) or opened.catalog.get(name) is None
        return (self._store / "quarantine" / f"{name}.safetensors").exists()


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-path.stat().st_size // 3, 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


def met(answers: Sequence[Any]) -> dict[str, int]:
    """How many requests were told that their prefix was lost, and how many of their answers are right.

    Args:
        answers: after `check`, which says so of each.
    """
    told = [
        answer
        for answer in answers
        if answer["end"] == "answered"
        and (answer["xkv"]["miss"] or {}).get("reason") in ("corrupt", "missing")
    ]
    return {"met_damage": len(told), "met_and_right": sum(answer.get("right", False) for answer in told)}


def counted(url: str) -> dict[str, float]:
    """What the server counted: blobs that it found lost, and prefixes that it asked to be made again."""
    from traffic_budgets import metrics

    values = metrics(url)
    asked = sum(values.get(name, 0.0) for name in _ASKED)
    found = sum(values.get(name, 0.0) for name in _FOUND)
    return {"counted_damage": found, "remakes_asked": asked}
