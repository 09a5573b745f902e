"""Neighbouring tensors are read at once, where they go to the same place and fit."""

from __future__ import annotations

import pytest

from xkv_artifacts.extents import extents_of, jobs_of
from xkv_artifacts.header import TensorInfo


def info(name: str, start: int, nbytes: int, dtype: str = "U8") -> TensorInfo:
    return TensorInfo(name, dtype, (nbytes,), start, start + nbytes)


def names(infos: list[TensorInfo], most: int = 100) -> list[str]:
    found = extents_of(infos, lambda name: name[0], most)
    assert [one.nbytes for one in found] == [sum(info.nbytes for info in one.infos) for one in found]
    return ["".join(info.name[1:] for info in one.infos) for one in found]


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([info("a1", 8, 4), info("a2", 12, 0), info("a3", 12, 5)], ["123"]),
        ([info("a1", 8, 4), info("b2", 12, 4), info("a3", 16, 4)], ["1", "2", "3"]),
        ([info("a1", 8, 4), info("a2", 20, 4)], ["1", "2"]),
        ([info("a1", 8, 60), info("a2", 68, 60), info("a3", 128, 200)], ["1", "2", "3"]),
        ([info("a1", 9, 3), info("a2", 12, 4, "F32")], ["1", "2"]),
        ([info("a1", 8, 4), info("a2", 12, 4, "F32")], ["12"]),
        ([], []),
    ],
    ids=["neighbours", "places", "a hole", "too much", "unaligned", "aligned", "nothing"],
)
def test_extents(infos: list[TensorInfo], expected: list[str]) -> None:
    assert names(infos) == expected


def test_small_extents_are_one_job() -> None:
    sizes = [40, 50, 20, 300, 0, 10]
    infos = [info("a", 1000 * number, size) for number, size in enumerate(sizes)]
    jobs = jobs_of(extents_of(infos, lambda name: name, 100), 100)
    assert [[extent.nbytes for extent in job] for job in jobs] == [[40, 50], [20], [300], [0, 10]]
