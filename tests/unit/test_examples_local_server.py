"""The server that the examples start: when they go on to it, and how they reach it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from examples import local_server

SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "model"}]}')

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Ready).serve_forever()
"""
SERVED = 5


@pytest.fixture(autouse=True)
def own_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a local server sets of the environment ends with the test."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "internal.example")


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


def test_no_proxy_is_asked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"http://127.0.0.1:{local_server.free_port()}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nobody)
    monkeypatch.setattr(local_server, "_START_S", 30.0)
    use(monkeypatch, "", SERVE)
    with local_server.local_server(tmp_path, tmp_path) as base_url:
        client = OpenAI(base_url=base_url, api_key="-", max_retries=0)
        assert [model.id for model in client.models.list()] == ["model"]
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "internal.example,127.0.0.1"
