"""Which of the bundled questions `--measure` asks over other documents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.documents import Documents
from examples.local_server import CORPUS
from examples.rag.__main__ import bundled_questions, main

DOCUMENT = "report-mendoza-grey-hill-company.md"


def test_those_about_the_documents_are_asked(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / DOCUMENT).write_bytes((CORPUS / DOCUMENT).read_bytes())
    (tmp_path / "other.md").write_text("Nothing is known of this one.")
    sources = [one.source for one in bundled_questions(Documents(tmp_path))]
    assert len(sources) > 20 and set(sources) == {Path(DOCUMENT).stem}


def test_none_about_them_is_told_before_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.md").write_text("Nothing is known of this one.")
    monkeypatch.setattr(sys, "argv", ["rag", "--measure", "--docs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code).startswith("error: no question of examples/questions is about a document in")
