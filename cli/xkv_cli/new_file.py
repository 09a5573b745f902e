"""Files and folders that a command is asked to write: tried before hours of work, named when they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from xkv_artifacts.errors import XKVError


class NewFile(click.Path):
    """A file to be written, in a folder that exists and lets it be.

    Args:
        suffixes: what its name may end in; none: anything.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, after a try."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"{str(path)!r}: there is no folder {str(path.parent)!r}", param, ctx)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{str(path)!r} does not end in {', '.join(self.suffixes)}", param, ctx)
        try:
            _try(path)
        except OSError as error:
            self.fail(f"{str(path)!r} cannot be written: {error.strerror or error}", param, ctx)
        return path


class NewFolder(click.Path):
    """A folder for files to be written: there, or to be made in one that is."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, after a try; a folder that is made for it is removed again."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            if not path.exists():
                path.mkdir()
                path.rmdir()
        except OSError as error:
            self.fail(f"{str(path)!r} cannot be made: {error.strerror or error}", param, ctx)
        return path


def _try(path: Path) -> None:
    """Make the file and remove it again, when it is not there yet."""
    if not path.exists():
        path.open("xb").close()
        path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system raises while `path` is written into one clear line.

    Raises:
        XKVError
    """
    try:
        yield
    except OSError as error:
        raise XKVError(
            f"cannot write {path}: {error.strerror or error}", hint="make room, or give another place"
        ) from None
