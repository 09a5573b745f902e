"""What commands say of a run, of an artifact's parts and of how long it is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from xkv_artifacts.manifest import PartFidelity, PrefixManifest
from xkv_cli import render
from xkv_workers.report import ArtifactLine, DocumentError, Parts, Report


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine there."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


def report(**changed: Any) -> Report:
    """A run over one document that failed."""
    fields = dict.fromkeys(("computed", "reused", "tokens", "bytes_full", "bytes_stored", "ratio"), 0)
    failed = {"failed": 1, "errors": (DocumentError("bin.dat", "not read"),), "artifacts": ()}
    return Report(**{"documents": 1, **fields, **failed, "seconds": 1.5, "calibration": None, **changed})


@pytest.mark.usefixtures("new_york")
def test_an_end_is_told_to_the_second_and_with_its_zone() -> None:
    assert render.retention(False, 1_795_838_461.5) == "ends 2026-11-27 23:01:01 EST"


def test_where_every_document_failed_there_are_no_figures_of_artifacts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render.report(report())
    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines() if line.strip()] == [
        ["documents", "1"],
        ["failed", "1"],
        ["time", "1.5", "s"],
    ]
    assert "failed bin.dat: not read" in shown.err


def test_a_run_says_how_many_artifacts_have_parts(capsys: pytest.CaptureFixture[str]) -> None:
    line = ArtifactLine("ab" * 32, "a.txt", 100, 10, 8.0, 0.99)
    for count, told in ((0, "0 artifacts"), (1, "1 artifact")):
        render.report(report(reused=1, failed=0, errors=(), artifacts=(line,), parts=Parts(count, ())))
        rows = [row.split(None, 2) for row in capsys.readouterr().out.splitlines() if row.strip()]
        assert ["with", "parts", told] in rows and ["computed", "0"] in rows


def test_parts_are_called_what_the_documentation_calls_them() -> None:
    shares = [(0.25, "leading 25 %"), (0.5, "leading half"), (0.75, "leading three quarters")]
    parts = tuple(PartFidelity(share=share, top1_agreement=0.5, kl=0.25) for share, _ in shares)
    manifest = cast(PrefixManifest, SimpleNamespace(fidelity=SimpleNamespace(parts=parts)))
    told = "of columns, in whole blocks: 50.0 % same next token, 0.25 nats"
    assert render._parts(manifest) == [(name, told) for _, name in shares]
