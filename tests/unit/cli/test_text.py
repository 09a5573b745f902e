"""`xkv text` prints what precompute compresses, to the byte."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from xkv_cli.main import xkv
from xkv_workers.errors import CorpusError


def printed(path: Path) -> Result:
    return CliRunner().invoke(xkv, ["text", str(path)])


def test_a_text_is_printed_as_it_is_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# K\xc3\xbcche\r\n\r\nThe keys. \n\n")
    assert printed(path).stdout_bytes == b"# K\xc3\xbcche\r\n\r\nThe keys. \n\n"


def test_a_page_is_printed_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text("<head><title>no</title></head><p>The  keys</p><script>no</script><p>hang here.</p>")
    assert printed(path).stdout_bytes == b"The  keys\nhang here."


def test_files_that_are_not_one_document(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n')
    for path in (tmp_path, lines):
        failed = printed(path)
        assert isinstance(failed.exception, CorpusError) and not failed.stdout_bytes
