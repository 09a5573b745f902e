"""How many workers a cluster gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xkv_workers import cluster as module
from xkv_workers.cluster import Crew, Room, plan_crew, plan_replicas, start_turn
from xkv_workers.errors import RayUnavailable
from xkv_workers.messages import Device

LAPTOP = Room(nodes=1, cpus=2, gpus=0, node_cpus=2)
GPU_BOX = Room(nodes=1, cpus=32, gpus=4, node_cpus=32)
CLUSTER = Room(nodes=3, cpus=24, gpus=0, node_cpus=8)
COMPOSED = Room(nodes=4, cpus=4, gpus=0, node_cpus=2, bare_nodes=2)


@pytest.mark.parametrize(
    ("room", "device", "workers", "crew"),
    [
        (LAPTOP, "cpu", None, Crew(1, "cpu", 2)),
        (LAPTOP, "cpu", 2, Crew(2, "cpu", 1)),
        (CLUSTER, "cpu", None, Crew(3, "cpu", 8)),
        (CLUSTER, "cpu", 6, Crew(6, "cpu", 4)),
        (COMPOSED, "cpu", None, Crew(2, "cpu", 2)),
        (COMPOSED, "cpu", 4, Crew(4, "cpu", 1)),
        (GPU_BOX, "cuda", None, Crew(4, "cuda", 8)),
        (GPU_BOX, "cuda", 2, Crew(2, "cuda", 8)),
        (GPU_BOX, "cpu", None, Crew(1, "cpu", 32)),
    ],
)
def test_workers_follow_the_hardware(room: Room, device: Device, workers: int | None, crew: Crew) -> None:
    assert plan_crew(room, device, workers) == crew


def test_a_small_model_is_loaded_once_per_core() -> None:
    assert plan_crew(LAPTOP, "cpu", None, small=True) == Crew(2, "cpu", 1)
    assert plan_crew(CLUSTER, "cpu", None, small=True) == Crew(12, "cpu", 2)
    assert plan_crew(GPU_BOX, "cuda", None, small=True) == Crew(4, "cuda", 8)


def test_what_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(RayUnavailable, match="Ray sees 0"):
        plan_crew(LAPTOP, "cuda", None)
    with pytest.raises(RayUnavailable, match="5 workers need as many GPUs; Ray sees 4"):
        plan_crew(GPU_BOX, "cuda", 5)
    with pytest.raises(RayUnavailable, match="3 workers need as many CPUs; Ray sees 2"):
        plan_crew(LAPTOP, "cpu", 3)


@pytest.mark.parametrize(
    ("room", "device", "least", "most", "crew"),
    [
        (LAPTOP, "cpu", 1, 1, Crew(1, "cpu", 2)),
        (LAPTOP, "cpu", 1, 2, Crew(2, "cpu", 1)),
        (CLUSTER, "cpu", 2, 6, Crew(6, "cpu", 4)),
        (COMPOSED, "cpu", 1, 3, Crew(3, "cpu", 1)),
        (GPU_BOX, "cuda", 1, 4, Crew(4, "cuda", 8)),
    ],
)
def test_replicas_leave_room_for_all_that_may_come(
    room: Room, device: Device, least: int, most: int, crew: Crew
) -> None:
    assert plan_replicas(room, device, least, most) == (crew, None)


def test_replicas_for_which_there_is_no_room_are_told_of() -> None:
    crew, shortage = plan_replicas(LAPTOP, "cpu", 1, 4)
    assert crew == Crew(1, "cpu", 2)
    assert shortage == "no room for 4 replicas: each takes 2 of the CPUs, and Ray sees 2"
    crew, shortage = plan_replicas(GPU_BOX, "cuda", 2, 8)
    assert crew == Crew(2, "cuda", 8)
    assert shortage == "no room for 8 replicas: each takes one of the GPUs, and Ray sees 4"


def test_more_replicas_than_fit_are_refused_with_how_many_do() -> None:
    for least, most in ((3, 4), (9, 9)):
        with pytest.raises(
            RayUnavailable, match=f"^{least} replicas need as many CPUs; Ray sees 2"
        ) as caught:
            plan_replicas(LAPTOP, "cpu", least, most)
        assert (caught.value.hint or "").startswith("use --replicas 2 or fewer, or join a larger cluster")
    with pytest.raises(RayUnavailable, match="5 replicas need as many GPUs") as caught:
        plan_replicas(GPU_BOX, "cuda", 5, 5)
    assert (caught.value.hint or "").startswith("use --replicas 4 or fewer, or --device cpu")


def test_one_ray_is_started_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with start_turn() as first, start_turn() as second:
        assert (first, second) == (True, False)
    with start_turn() as third:
        assert third
    (tmp_path / f"xkv-{os.getuid()}-ray.lock").unlink()
    (tmp_path / f"xkv-{os.getuid()}-ray.lock").symlink_to("/dev/null")
    with start_turn() as unlocked:
        assert unlocked, "a lock that cannot be used keeps nobody waiting"


class Stopped(Exception):
    """What this process does at SIGTERM."""


def test_rays_processes_get_no_sigterm_and_this_one_keeps_its_handler() -> None:
    def stop(*_: object) -> None:
        raise Stopped

    def end(number: int, _: object) -> None:
        raise SystemExit(number)  # as Ray's handler

    wait = [sys.executable, "-c", "print(flush=True); input()"]
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped), module._sigterm_for_us_alone():
            signal.signal(signal.SIGTERM, end)
            child = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with child:
                assert child.stdout is not None
                child.stdout.readline()
                child.terminate()
                child.communicate(b"\n")
            assert child.returncode == 0
            end(15, None)
        assert signal.getsignal(signal.SIGTERM) is stop
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGTERM, before)
