"""The progress bar of `xkv precompute`: what a person in a terminal sees, and what a log file does not."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.text import Text

from xkv_cli.progress import watch
from xkv_workers.observer import Observer, Progress

HALFWAY = Progress(
    documents=12,
    settled=5,
    reading=False,
    ready=True,
    tokens=40_000,
    tokens_left=150_000,
    tokens_per_second=1234.0,
    ratio=8.04,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[io.StringIO, Progress], str]:
    """The last line drawn on a stream, without its colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def draw(stream: io.StringIO, now: Progress) -> str:
        with watch(stream) as observer:
            observer.progress(now)
        return Text.from_ansi(stream.getvalue()).plain

    return draw


def test_a_person_sees_documents_speed_ratio_and_the_time_left(
    shown: Callable[[io.StringIO, Progress], str],
) -> None:
    text = shown(Terminal(), HALFWAY)
    for figure in ("5/12 documents", "1,234 tokens/s", "8.0x", "ETA 2:02"):
        assert figure in text, text


def test_before_the_first_figures_it_says_what_is_going_on(
    shown: Callable[[io.StringIO, Progress], str],
) -> None:
    nothing = {"settled": 0, "tokens": 0, "tokens_per_second": 0.0, "ratio": 0.0}
    for ready, left, doing in (
        (False, 0, "reading"),
        (False, 9, "loading the model"),
        (True, 9, "computing"),
    ):
        text = shown(
            Terminal(), Progress(**{**vars(HALFWAY), **nothing, "ready": ready, "tokens_left": left})
        )
        assert doing in text and "tokens/s" not in text and "ETA" not in text, text


def test_the_time_left_has_no_sixtieth_second_and_waits_for_the_last_document(
    shown: Callable[[io.StringIO, Progress], str],
) -> None:
    two_minutes = {**vars(HALFWAY), "tokens_left": 119_700, "tokens_per_second": 1000.0}
    assert "ETA 2:00" in shown(Terminal(), Progress(**two_minutes))
    text = shown(Terminal(), Progress(**{**two_minutes, "reading": True}))
    assert "5/12+ documents" in text and "ETA" not in text


def test_a_log_file_gets_notes_and_no_bar(shown: Callable[[io.StringIO, Progress], str]) -> None:
    assert shown(io.StringIO(), HALFWAY) == ""
    log = io.StringIO()
    observer: Observer
    with watch(log) as observer:
        observer.note("a.txt [1] is tried again")
    assert log.getvalue() == "note: a.txt [1] is tried again\n"
