"""Parts of a blob that several threads read go where they are to go, checked, in order."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.artifact_samples import sample
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.format import read_parts, write_prefix
from xkv_artifacts.read_ahead import AHEAD, read_ahead

PARTS = [
    ["tokens", "rotary.0.inv_freq", "layer.1.window.keys"],
    ["group.0.key.factors.0", "group.0.key.factors.1", "layer.0.sketch.codes"],
    ["group.0.value.factors.0", "group.0.value.bases.1"],
]


class Kept:
    """A landing that notes what came to it."""

    threads = 3
    together = False

    def __init__(self) -> None:
        self.buffers: dict[str, list[torch.Tensor]] = {}
        self.places: list[str] = []

    def place(self, name: str) -> str:
        return name if name.endswith(".codes") else name.split(".")[0]

    def buffer(self, place: str, nbytes: int) -> torch.Tensor:
        buffer = torch.full((nbytes,), 255, dtype=torch.uint8)
        self.buffers.setdefault(place, []).append(buffer)
        return buffer

    def placed(self, place: str, buffer: torch.Tensor) -> torch.Tensor:
        self.places.append(place)
        return buffer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    manifest, tensors = sample()
    with (tmp_path / "blob").open("wb") as file:
        write_prefix(file, manifest, tensors)
    return tmp_path / "blob"


@pytest.mark.parametrize("local", [True, False])
def test_parts_land_as_they_are_read_plainly(path: Path, local: bool) -> None:
    landing = Kept()
    with path.open("rb") as opened:
        file = opened if local else io.BytesIO(opened.read())
        expected = list(read_parts(file, PARTS)[1])
        found = list(read_parts(file, PARTS, landing)[1])
    for mine, plain in zip(found, expected, strict=True):
        assert mine.keys() == plain.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == plain[name].dtype and torch.equal(tensor, plain[name])
            buffers = landing.buffers[landing.place(name)]
            assert not tensor.numel() or any(_within(tensor, buffer) for buffer in buffers)
    assert set(landing.places) == {landing.place(name) for part in PARTS for name in part}


def test_a_damaged_tensor_never_lands(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the sketch's codes, which are last in the file
    landing = Kept()
    _, parts = read_parts(io.BytesIO(content), PARTS, landing)
    assert next(parts).keys() == set(PARTS[0])
    with pytest.raises(CorruptArtifact, match="layer.0.sketch.codes: the checksum does not match"):
        next(parts)
    assert "layer.0.sketch.codes" in landing.buffers and "layer.0.sketch.codes" not in landing.places


def test_only_so_many_parts_are_begun() -> None:
    begun: list[int] = []

    def job(number: int) -> Callable[[], int]:
        return lambda: (begun.append(number), number)[1]

    parts = read_ahead(([job(number)] for number in range(10)), threads=2)
    for number in range(10):
        assert next(parts) == [number]
        time.sleep(0.01)
        assert sorted(begun) == list(range(min(10, number + 1 + AHEAD)))
    assert next(parts, None) is None


def test_an_error_comes_in_its_place_and_ends_the_threads() -> None:
    def fail() -> int:
        raise ValueError("no")

    parts = read_ahead([[lambda: 1], [lambda: 2, fail], [lambda: 3]], threads=2)
    assert next(parts) == [1]
    with pytest.raises(ValueError, match="no"):
        next(parts)
    assert not _readers()


def test_closing_waits_for_what_has_begun_and_leaves_out_the_rest() -> None:
    gate, reached, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        reached.set()
        gate.wait(10)
        ended.append("slow")

    parts = read_ahead([[lambda: None], [slow, lambda: ended.append("left out")], []], threads=1)
    next(parts)
    assert reached.wait(10)
    threading.Timer(0.05, gate.set).start()
    parts.close()
    assert ended == ["slow"] and not _readers()


def _within(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - buffer.data_ptr() <= buffer.nbytes - tensor.nbytes


def _readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("blob-reader")]


def test_parts_that_come_together_are_all_read_before_the_first() -> None:
    """An error still comes in its part's place."""
    done: list[int] = []

    def fail() -> int:
        raise ValueError("damaged")

    def job(number: int) -> Callable[[], int]:
        return lambda: done.append(number) or number

    jobs: list[list[Callable[[], int]]] = [[job(number)] for number in range(10)]
    parts = read_ahead(jobs, threads=2, together=True)
    assert next(parts) == [0] and sorted(done) == list(range(10))
    assert list(parts) == [[number] for number in range(1, 10)]
    parts = read_ahead([*jobs, [fail], [job(10)]], threads=2, together=True)
    assert [next(parts) for _ in range(10)] == [[number] for number in range(10)]
    with pytest.raises(ValueError, match="damaged"):
        next(parts)
