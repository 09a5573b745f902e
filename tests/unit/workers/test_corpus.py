"""What a folder of files becomes, and what a bad file is told."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from xkv_workers import readers
from xkv_workers.corpus import CorpusFile, Document, Rejected, list_files, read_file
from xkv_workers.errors import CorpusError


def read(*paths: Path) -> list[Document | Rejected]:
    found: list[Document | Rejected] = []
    for entry in list_files(paths):
        found.extend(read_file(entry) if isinstance(entry, CorpusFile) else [entry])
    return found


def reason(path: Path) -> str:
    (only,) = read(path)
    assert isinstance(only, Rejected), only
    assert "\n" not in only.reason
    return only.reason


def test_folders_are_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "sub" / ".git").mkdir(parents=True)
    for name in ("b.md", "a.txt", "sub/c.rst", ".hidden.txt", "sub/.git/d.txt", "image.png"):
        (corpus / name).write_text(f"text of {name}")
    documents = read(corpus)
    assert [document.uri for document in documents] == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.rst"]


def test_text_is_verbatim_and_hashed(tmp_path: Path) -> None:
    content = "one\r\ntwo \n\n\tthree é\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (document,) = read(tmp_path / "a.txt")
    assert isinstance(document, Document)
    assert document.text.encode() == content
    assert document.sha256 == hashlib.sha256(content).hexdigest()
    assert document.uri == "a.txt"


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (document,) = read(tmp_path)
    assert isinstance(document, Document) and document.text == "hello"


def test_html_gives_what_a_reader_sees(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>t</title><style>p{}</style></head><body><h1>Rules</h1>"
        "<script>var x = 1</script><p>The code is <b>48213</b>.</p></body></html>"
    )
    (document,) = read(tmp_path)
    assert isinstance(document, Document)
    assert document.text.split() == ["Rules", "The", "code", "is", "48213", "."]


def test_pdf_gives_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(tiny_pdf("The code is 48213."))
    (document,) = read(tmp_path)
    assert isinstance(document, Document)
    assert document.text == "The code is 48213."


def test_each_line_of_jsonl_is_a_document_and_bad_lines_are_told_by_number(tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": "a", "text": "alpha"}),
        "{not json",
        json.dumps({"id": "b"}),
        "",
        json.dumps({"text": "no id"}),
        json.dumps([1]),
        json.dumps({"id": 7, "text": "seven"}),
        '{"id": "s", "text": "\\ud800"}',
        json.dumps({"id": "e", "text": " "}),
        "1" * 5000,
        "[" * 100_000,
        json.dumps({"id": "n", "text": 5}),
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    found = read(tmp_path / "d.jsonl")
    assert [item.uri for item in found if isinstance(item, Document)] == ["d.jsonl#a", "d.jsonl#7"]
    rejected = [item for item in found if isinstance(item, Rejected)]
    told = [f"{item.uri}: {item.reason}" for item in rejected]
    for expected in (
        "d.jsonl#line 2: not JSON: ",
        'd.jsonl#line 3: no "text"',
        'd.jsonl#line 5: no "id"',
        "d.jsonl#line 6: not an object",
        'd.jsonl#line 12: "text" is not a string',
    ):
        assert any(line.startswith(expected) for line in told), (expected, told)
    assert len(told) == 9 and not any("line" in item.reason for item in rejected)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "empty"),
        ("a.md", b" \n\t ", "empty"),
        ("a.txt", b"ELF\0\1\2", "NUL"),
        ("a.txt", "é".encode("latin-1"), "not UTF-8: byte 0xe9 at offset 0"),
        ("a.html", b"<p></p>", "empty"),
        ("a.pdf", b"not a pdf", "not a readable PDF"),
        ("a.pdf", b"%PDF-1.4\n1 0 obj\n<<", "not a readable PDF"),
        ("a.jsonl", b"", "empty"),
        ("a.png", b"x", "files of kind .png are not read (xkv reads .txt, .md, "),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in reason(tmp_path / name)


def test_the_pdf_library_adds_no_lines_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.pdf").write_bytes(b"not a pdf")
    assert "not a readable PDF" in reason(tmp_path)
    assert caplog.records == []


def test_a_huge_file_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as sparse:
        sparse.truncate(readers.MAX_DOCUMENT_BYTES * 100)
    assert "larger than 64 MiB" in reason(tmp_path)


def test_special_files_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert reason(tmp_path) == "not a regular file"


def test_deeply_nested_html_is_an_error_or_text(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<div>" * 50_000 + "deep")
    assert len(read(tmp_path)) == 1


class TestLinks:
    def test_out_of_the_corpus_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        (corpus / "link.txt").symlink_to(tmp_path / "secret.txt")
        (corpus / "folder").symlink_to(tmp_path)
        found = read(corpus)
        assert [item.uri for item in found] == ["corpus/folder", "corpus/link.txt"]
        assert all(isinstance(item, Rejected) and "refused" in item.reason for item in found)

    def test_inside_the_corpus_is_followed_once(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.txt").write_text("alpha")
        (tmp_path / "link.txt").symlink_to(tmp_path / "sub" / "a.txt")
        (tmp_path / "loop").symlink_to(tmp_path)
        assert [item.uri.split("/", 1)[1] for item in read(tmp_path)] == ["link.txt", "sub/a.txt"]

    def test_leading_nowhere_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").symlink_to(tmp_path / "missing")
        (tmp_path / "b.txt").symlink_to(tmp_path / "b.txt")
        found = read(tmp_path)
        assert [item.reason for item in found if isinstance(item, Rejected)] == [
            "symbolic link that leads nowhere"
        ] * 2

    def test_the_corpus_itself_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "a.txt").write_text("alpha")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert len(read(tmp_path / "link")) == 1


def test_names_that_are_not_utf8_are_reported_printably(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")).write_text("alpha")
    (document,) = read(tmp_path)
    assert document.uri.encode("utf-8").endswith(b"/bad\\xff.txt")


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no documents in"):
        list_files([tmp_path])
    with pytest.raises(CorpusError, match="no such file or folder"):
        list_files([tmp_path / "missing"])


def tiny_pdf(text: str) -> bytes:
    """One page with one line, cross-reference table included."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(content))
    return content + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


def test_names_cannot_command_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\n.txt").write_text("alpha")
    (tmp_path / "b.jsonl").write_text(
        '{"id": "\\u001b[2J", "text": "x"}\n' + json.dumps({"id": "a" * 600, "text": "x"})
    )
    found = read(tmp_path)
    assert found[0].uri.endswith("/a\\x1b[31m\\n.txt")
    assert all("too long or not printable" in item.reason for item in found[1:] if isinstance(item, Rejected))
    assert len(found) == 3
