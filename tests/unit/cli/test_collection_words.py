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


def test_what_cannot_be_deleted_is_told_where_it_is_over_the_budget_by_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(Excess(None, 5 * 2**20, 0, 0, 4 * 2**20, untouched=True), capsys)
    assert text.startswith("error: the store is 5.0 MiB over its limit, and nothing was deleted for that: ")
    assert "over it by itself (4.0 MiB of calibrations, 0 B of pinned artifacts)\n" in text
    assert text.count("\n") == 2 and "xkv calibrations rm" in text and "unpin" not in text
    assert "xkv unpin" in said(Excess(None, 2**20, 0, 2**20, untouched=True), capsys)


def test_a_namespace_holds_no_calibrations(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(Excess("acme", 0, 2, 2**20), capsys)
    assert "namespace acme is still 2 artifacts over its limit; 1.0 MiB of what it holds are pinned" in text
    assert "calibrations" not in text
