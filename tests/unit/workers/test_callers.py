"""Whose calls a replica gives up. Who dies is chosen here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayError

from xkv_workers.serving.callers import Callers


@pytest.mark.parametrize(("error", "cancelled"), [(OwnerDiedError, True), (ActorDiedError, False)])
def test_calls_of_who_died_end_and_others_go_on(error: type[RayError], cancelled: bool) -> None:
    """Not where the one died who never answers."""

    async def see() -> None:
        presences = {name: asyncio.get_running_loop().create_future() for name in ("dead", "alive")}

        async def presence_of(caller: str) -> list[Any]:
            return [presences[caller]] if caller in presences else []

        callers = Callers(presence_of)

        async def call(caller: str) -> None:
            with callers.call(caller):
                await asyncio.sleep(60)

        calls = [asyncio.create_task(call(caller)) for caller in ("dead", "dead", "alive", "unknown")]
        await asyncio.sleep(0.01)
        presences["dead"].set_exception(error("00" * 28, b"", "") if cancelled else error())
        await asyncio.sleep(0.05)
        assert [one.cancelled() for one in calls] == [cancelled, cancelled, False, False]
        for one in calls:
            one.cancel()
        await asyncio.wait(calls)

    asyncio.run(see())
