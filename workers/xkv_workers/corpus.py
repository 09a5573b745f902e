"""From `--docs` paths to documents. What is in the files, and the links between them, is untrusted."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xkv_workers.errors import BadDocument, CorpusError
from xkv_workers.readers import READERS, SUFFIXES, read_jsonl


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Args:
        uri: folder given, path below it, `#id` for a line of a jsonl file; says nothing of this machine.
        text: never empty. sha256: of the text's UTF-8 bytes.
    """

    uri: str
    text: str
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used, and why, in one line."""

    uri: str
    reason: str


@dataclass(frozen=True)
class CorpusFile:
    """A file to read: where it is, and the name it is reported by."""

    path: Path
    uri: str


def list_files(paths: Sequence[str | Path]) -> list[CorpusFile | Rejected]:
    """Every file under `paths`, in the order given, folders sorted by name.

    Hidden files and kinds of file that are not read are left out of folders. A symbolic link is followed
    only to a file of the same folder given: anything else is rejected.

    Raises:
        CorpusError: a path does not exist, or there is nothing to read.
    """
    found: list[CorpusFile | Rejected] = []
    for path in map(Path, paths):
        if path.is_dir():
            found.extend(_walk(path.resolve()))
        elif path.exists():
            found.append(CorpusFile(path.resolve(), printable(path.name)))
        else:
            raise CorpusError(f"no such file or folder: {path}", hint="check the paths after --docs")
    if not found:
        raise CorpusError(
            f"no documents in {', '.join(str(path) for path in paths)}",
            hint=f"xkv reads {', '.join(SUFFIXES)}",
        )
    return found


def read_file(file: CorpusFile) -> Iterator[Document | Rejected]:
    """The documents in one file: one, or one per line of a jsonl file."""
    try:
        if not stat.S_ISREG(file.path.stat().st_mode):
            raise BadDocument("not a regular file")
        suffix = file.path.suffix.lower()
        if suffix == ".jsonl":
            yield from _read_lines(file)
        elif suffix in READERS:
            yield _checked(file.uri, READERS[suffix](file.path))
        else:
            raise BadDocument(
                f"files of kind {suffix or '(no suffix)'} are not read",
                hint=f"xkv reads {', '.join(SUFFIXES)}",
            )
    except BadDocument as error:
        yield _rejected(file.uri, error)
    except OSError as error:
        yield Rejected(file.uri, f"cannot be read: {error.strerror or error}")


def _read_lines(file: CorpusFile) -> Iterator[Document | Rejected]:
    empty = True
    for name, text in read_jsonl(file.path):
        empty = False
        uri = f"{file.uri}#{name}"
        try:
            yield _rejected(uri, text) if isinstance(text, BadDocument) else _checked(uri, text)
        except BadDocument as error:
            yield _rejected(uri, error)
    if empty:
        raise BadDocument("empty: no lines in it")


def _checked(uri: str, text: str) -> Document:
    if not text.strip():
        raise BadDocument("empty: no text in it" if text else "empty: 0 characters")
    if "\0" in text:
        raise BadDocument("binary data (NUL characters), not text")
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" in JSON
        raise BadDocument(f"not Unicode text: lone surrogate at character {error.start}") from None
    return Document(uri, text, hashlib.sha256(content).hexdigest())


def _rejected(uri: str, error: BadDocument) -> Rejected:
    return Rejected(uri, f"{error.message} ({error.hint})" if error.hint else error.message)


def _walk(root: Path) -> Iterator[CorpusFile | Rejected]:
    """Files below `root`; links to folders inside it are skipped, since their files are met anyway."""
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        for name in sorted([*files, *linked]):
            path = Path(folder, name)
            if name.startswith(".") or (path.suffix.lower() not in SUFFIXES and name not in linked):
                continue
            entry = _entry(root, path)
            if entry is not None:
                yield entry
    for error in unreadable:
        yield Rejected(_uri(root, Path(str(error.filename))), f"cannot be listed: {error.strerror}")


def _entry(root: Path, path: Path) -> CorpusFile | Rejected | None:
    if not path.is_symlink():
        return CorpusFile(path, _uri(root, path))
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        return Rejected(_uri(root, path), "symbolic link that leads nowhere")
    if not target.is_relative_to(root):
        return Rejected(_uri(root, path), "symbolic link out of the corpus: refused")
    return None if target.is_dir() else CorpusFile(target, _uri(root, path))


def _uri(root: Path, path: Path) -> str:
    return printable(f"{root.name}/{path.relative_to(root).as_posix()}")


def printable(name: str) -> str:
    """The name with what a terminal or a JSON reader could choke on written as escapes."""
    decoded = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in decoded)
