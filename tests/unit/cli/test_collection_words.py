"""What `xkv gc` says where a limit is exceeded all the same."""

from __future__ import annotations

import pytest

from xkv_artifacts.reports import Collection, Excess
from xkv_cli.collection import _show


def said(excess: Excess, capsys: pytest.CaptureFixture[str]) -> str:
    _show(Collection((), 0, 0, (excess,), dry_run=True))
    return capsys.readouterr().err


def test_calibrations_are_named_with_what_removes_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(Excess(None, 3 * 2**20, 0, 0, 4 * 2**20), capsys)
    assert "the store is still 3.0 MiB over its limit; 0 B of what it holds are pinned, 4.0 MiB are" in text
    assert "calibrations, which are never collected" in text and "xkv calibrations rm" in text


def test_a_namespace_holds_no_calibrations(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(Excess("acme", 0, 2, 2**20), capsys)
    assert "namespace acme is still 2 artifacts over its limit; 1.0 MiB of what it holds are pinned" in text
    assert "calibrations" not in text
