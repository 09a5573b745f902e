"""Neighbouring tensors of a file that are read at once, into one piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xkv_artifacts.header import DTYPES, TensorInfo


@dataclass(frozen=True)
class Extent:
    """Tensors of one place.

    Args:
        place: where they go to. infos: in the order of the file, each beginning where the one before ends,
            at a multiple of its element's size.
    """

    place: str
    infos: tuple[TensorInfo, ...]

    @property
    def start(self) -> int:
        """Byte offset from the start of the file."""
        return self.infos[0].start

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.infos[-1].stop - self.start

    def range_of(self, info: TensorInfo) -> slice:
        """Where one of them lies in the extent."""
        return slice(info.start - self.start, info.stop - self.start)


def extents_of(infos: Iterable[TensorInfo], place_of: Callable[[str], str], most: int) -> list[Extent]:
    """Extents of at most `most` bytes; a tensor that is larger has one of its own.

    Args:
        infos: in the order of the file. place_of: by a tensor's name, where it goes to.
    """
    runs: list[tuple[str, list[TensorInfo]]] = []
    for info in infos:
        place = place_of(info.name)
        if not runs or runs[-1][0] != place or not _follows(runs[-1][1], info, most):
            runs.append((place, []))
        runs[-1][1].append(info)
    return [Extent(place, tuple(run)) for place, run in runs]


def jobs_of(extents: Iterable[Extent], most: int) -> list[list[Extent]]:
    """Extents that one thread reads: waking a thread takes longer than reading a small one."""
    jobs: list[list[Extent]] = []
    size = most
    for extent in extents:
        if size + extent.nbytes > most:
            jobs.append([])
            size = 0
        jobs[-1].append(extent)
        size += extent.nbytes
    return jobs


def _follows(run: list[TensorInfo], info: TensorInfo, most: int) -> bool:
    start = run[0].start
    aligned = (info.start - start) % DTYPES[info.dtype] == 0
    return run[-1].stop == info.start and info.stop - start <= most and aligned
