"""What follows from a server's settings."""

from __future__ import annotations

from xkv_service.api.settings import APISettings
from xkv_workers.messages import ModelPlace
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
