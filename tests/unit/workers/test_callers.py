"""Whose calls a replica gives up. Who dies is chosen here."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayError

from xkv_workers.serving.callers import Caller, Callers


@pytest.mark.parametrize(("error", "cancelled"), [(OwnerDiedError, True), (ActorDiedError, False)])
def test_calls_of_who_died_end_and_others_go_on(error: type[RayError], cancelled: bool) -> None:
    """Not where the one died who never answers."""

    async def see() -> None:
        callers = Callers()
        dead, alive = (Caller(asyncio.get_running_loop().create_future()) for _ in range(2))

        async def call(caller: Caller) -> None:
            with callers.call(caller):
                await asyncio.sleep(60)

        calls = [asyncio.create_task(call(caller)) for caller in (dead, dead, alive)]
        await asyncio.sleep(0)
        dead.presence.set_exception(error("00" * 28, b"", "") if cancelled else error())
        await asyncio.sleep(0.05)
        assert [one.cancelled() for one in calls] == [cancelled, cancelled, False]
        for one in calls:
            one.cancel()
        await asyncio.wait(calls)

    asyncio.run(see())
