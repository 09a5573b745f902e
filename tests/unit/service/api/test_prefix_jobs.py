"""Prefixes that wait to be made, and the model object that they are made with."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import paced_backend

from xkv_artifacts.store import ArtifactStore
from xkv_service.api import local_prefixes
from xkv_service.api.backend import NewPrefix, PrefixChanges
from xkv_service.api.local_prefixes import LocalPrefixes
from xkv_service.errors import CacheMisuse, Overloaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.shared_weights import sharing_weights


def test_jobs_wait_their_turn_and_too_many_are_refused(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = threading.Event()
    compress = local_prefixes.compress

    def held(*arguments: Any) -> Any:
        assert going.wait(300)
        return compress(*arguments)

    monkeypatch.setattr(local_prefixes, "compress", held)

    def new(number: int) -> NewPrefix:
        return NewPrefix("a", [5 + number, *range(10, 150)], str(number), "0" * 64)

    async def scenario(prefixes: LocalPrefixes, store: ArtifactStore) -> None:
        first = await prefixes.create(new(0))
        while (await prefixes.get(["a"], first.id)).status != "running":  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        waiting = [await prefixes.create(new(number)) for number in (1, 2)]
        assert [record.status for record in waiting] == ["queued", "queued"]
        with pytest.raises(Overloaded, match="2 prefixes wait"):
            await prefixes.create(new(3))
        assert await prefixes.create(new(1)) == waiting[0]
        listed = await prefixes.page("a", None, 10)
        assert [record.id for record in listed.records] == [waiting[1].id, waiting[0].id, first.id]
        changed = await prefixes.change(["a"], waiting[1].id, PrefixChanges(pinned=True))
        assert changed is not None and changed.pinned
        assert await prefixes.delete(["b"], waiting[0].id) is False
        assert await prefixes.delete(["a"], waiting[0].id)
        assert await prefixes.delete(["a"], first.id)  # while it is being made
        going.set()
        while (await prefixes.get(["a"], waiting[1].id)).status != "ready":  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        assert (await prefixes.get(["a"], waiting[1].id)).pinned  # type: ignore[union-attr]
        assert await prefixes.get(["a"], first.id) is None
        assert store.get(first.id) is None and store.get(waiting[0].id) is None

    with ArtifactStore.open(str(tmp_path), patience_s=0) as store:
        prefixes = LocalPrefixes(store, loaded, ratio=2.0, most_waiting=2)
        try:
            asyncio.run(scenario(prefixes, store))
        finally:
            going.set()
            prefixes.close()


def test_a_second_model_over_the_same_weights(loaded: LoadedModel, store: ArtifactStore) -> None:
    other = sharing_weights(loaded).model
    pairs = list(zip(loaded.model.parameters(), other.parameters(), strict=True))
    assert pairs and all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    before = loaded.model.config._attn_implementation
    other.set_attn_implementation("eager")
    assert loaded.model.config._attn_implementation == before
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    with paced_backend(loaded, store), pytest.raises(CacheMisuse, match="in use"):
        while True:
            sharing_weights(loaded)
