"""The documents of the examples are those that `xkv precompute` compresses."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from examples.connection import read_documents
from examples.documents import Documents


def test_a_folder_has_the_documents_that_precompute_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / "folder.md").mkdir()
    for name in ("b.txt", "A.MD", ".hidden.md", ".venv/license.txt", "folder.md/c.rst", "image.png"):
        (tmp_path / name).write_bytes(f"one\r\ntwo of {name}\n".encode())
    (tmp_path / "d.html").write_text("<p>visible</p><script>not</script>")
    (tmp_path / "e.jsonl").write_text('{"id": "1", "text": "a line"}\n')
    documents = Documents(tmp_path)
    assert documents.names == ["A.MD", "b.txt", "d.html", "e.jsonl#1", "folder.md/c.rst"]
    assert documents.text("A.MD") == "one\r\ntwo of A.MD\n"
    assert (documents.text("d.html"), documents.text("e.jsonl#1")) == ("visible", "a line")
    assert capsys.readouterr().err == ""


def test_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert Documents(tmp_path / "a.txt").names == ["a.txt"]


def test_what_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty\n.txt").touch()
    assert Documents(tmp_path).names == ["a.txt"]
    empty, latin = capsys.readouterr().err.splitlines()
    assert empty.startswith(f"left out {tmp_path.name}/empty\\n.txt: empty")
    assert latin.startswith(f"left out {tmp_path.name}/latin.txt: not UTF-8")


def test_no_documents_are_one_line(tmp_path: Path) -> None:
    for folder, said in (
        (tmp_path / "none", "error: no such file or folder: "),
        (tmp_path, "error: no documents in "),
    ):
        with pytest.raises(SystemExit) as ended:
            read_documents(Namespace(docs=folder))
        assert str(ended.value.code).startswith(f"{said}{folder}\nhint: ")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit, match=f"error: no document in {tmp_path} can be read\n"):
        read_documents(Namespace(docs=tmp_path))
