"""The server that the examples start: when they go on to it, and what it said where it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples import local_server

SERVED = 5


def use(monkeypatch: pytest.MonkeyPatch, precompute: str, serve: str) -> None:
    """Scripts in the place of the commands."""
    commands = {"precompute": precompute, "serve": serve}
    monkeypatch.setattr(
        local_server, "_xkv", lambda name, *rest: [sys.executable, "-c", commands[name], *rest]
    )


@pytest.mark.parametrize(("status", "expected"), [(0, ""), (3, "why it failed")])
def test_a_servers_words_are_shown_where_it_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int,
    expected: str,
) -> None:  # fmt: skip
    use(monkeypatch, "", f"import sys; print('why it failed', file=sys.stderr); sys.exit({status})")
    with pytest.raises(SystemExit) as ended, local_server.local_server(tmp_path, tmp_path):
        pass
    assert ended.value.code == (status or 1)
    assert capsys.readouterr().err.strip() == expected


@pytest.mark.parametrize(
    ("status", "actions", "expected"),
    [
        (0, None, SERVED),
        (1, ["compute", "reuse"], SERVED),
        (1, ["compute", "same as another"], 1),
        (1, [], 1),
        (1, None, 1),
        (2, ["reuse"], 2),
        (130, ["reuse"], 130),
    ],
)
def test_what_is_stored_is_served_though_some_documents_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: int,
    actions: list[str] | None, expected: int,
) -> None:  # fmt: skip
    plan = None if actions is None else json.dumps({"plan": [{"action": action} for action in actions]})
    dry = f"print({plan!r}) if {plan!r} else print('error: again', file=sys.stderr)"
    run = "print('failed b.md: why', file=sys.stderr)"
    precompute = f"import sys\nif '--dry-run' in sys.argv: {dry}\nelse: {run}\nsys.exit({status})"
    use(monkeypatch, precompute, f"import sys; sys.exit({SERVED})")
    with pytest.raises(SystemExit) as ended, local_server.local_server(tmp_path, tmp_path):
        pass
    assert ended.value.code == expected
    assert capfd.readouterr() == ("", "failed b.md: why\n")
