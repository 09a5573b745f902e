"""What follows from a server's settings."""

from __future__ import annotations

import pytest

from xkv_service.api.settings import APISettings
from xkv_service.engine.settings import EngineSettings
from xkv_service.errors import InvalidSpec
from xkv_workers.messages import ModelPlace
from xkv_workers.serving.scaling import Scaling
from xkv_workers.serving.server import ServeRequest
from xkv_workers.serving.settings import ServeSettings

PLACE = ModelPlace(
    model="m",
    revision=None,
    dtype="float32",
    fingerprint="f",
    device="cpu",
    threads=1,
    store_url="s",
    redis_url="r",
)


def test_a_replica_that_leaves_has_time_for_the_longest_answer() -> None:
    assert ServeSettings(PLACE, api=APISettings(request_timeout_s=900)).drain_s > 900


def test_each_replica_is_to_have_a_full_batch_unless_something_else_is_asked_for() -> None:
    engine = EngineSettings(max_running=4)
    assert ServeSettings(PLACE, engine=engine).target_requests == 4
    assert ServeSettings(PLACE, engine=engine, scaling=Scaling(1, 2, 7)).target_requests == 7


def test_a_target_that_no_number_of_requests_reaches_is_refused() -> None:
    engine = EngineSettings(max_running=2)
    assert ServeRequest("store", engine=engine, scaling=Scaling(1, 2, 34)).scaling.target_requests == 34
    with pytest.raises(InvalidSpec, match="target_requests=35 would bring no replica"):
        ServeRequest("store", engine=engine, scaling=Scaling(1, 2, 35))
