"""The status page in a real browser, on a phone and on a desk, with and without keys. Needs Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from engines import PacedBackend
from rivers import DOCUMENT, SETTINGS, key, publish
from serving import serve
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from xkv_artifacts.errors import CatalogUnavailable
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.models import LoadedModel

CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 1200)
MEASURE = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const key = new URLSearchParams(location.search).get("key");
if (key) sessionStorage.setItem("key", key);
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = "/";
  document.body.append(frame);
}
function linesOf(word, page) {
  const cell = page.querySelector("td.name"), range = page.createRange();
  if (!cell) return 0;
  cell.textContent = `${word}-${word}.txt`;
  range.setStart(cell.firstChild, 0);
  range.setEnd(cell.firstChild, word.length);
  return range.getClientRects().length;
}
setTimeout(() => {
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, text = name => page.getElementById(name).textContent;
    const box = page.getElementById("prefixes").parentElement;
    return {beyond: box.scrollWidth - box.clientWidth, overflow: getComputedStyle(box).overflowX,
      inner: frame.contentWindow.innerWidth, wide: page.documentElement.scrollWidth,
      state: text("state"), tiles: text("tiles"), misses: text("misses"), prefixes: text("prefixes"),
      shown: !page.getElementById("main").hidden, door: !page.getElementById("door").hidden,
      lines: linesOf("counterrevolutionary", page)};
  }));
}, 4000);
</script>""".replace("WIDTHS", json.dumps(WIDTHS))

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browse(url: str, profile: Path) -> tuple[list[dict[str, Any]], str]:
    """What the frames show after two polls, and what the browser wrote."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--dump-dom",
        "--virtual-time-budget=6000",
        "--window-size=1280,900",
    ]
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stdout[:2000]
    return json.loads(unescape(found.group(1))), done.stderr


def measured(app: ASGIApp) -> ASGIApp:
    """The app, and at /measure a page that looks at its status page in frames of several widths."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        page = scope["type"] == "http" and scope["path"] == "/measure"
        await (HTMLResponse(MEASURE) if page else app)(scope, receive, send)

    return outer


@pytest.fixture(scope="module")
def maker(store: ArtifactStore, loaded: LoadedModel) -> Iterator[PrefixMaker]:
    publish(store, loaded, DOCUMENT, "alpha")
    publish(store, loaded, f"Theirs. {DOCUMENT}", "beta")
    maker = PrefixMaker(store, loaded)
    yield maker
    maker.close()


@pytest.fixture
def prefixes(store: ArtifactStore, maker: PrefixMaker) -> StoredPrefixes:
    """They are closed with the app that shows them."""
    return StoredPrefixes(store, maker)


def test_what_it_shows_without_keys(
    prefixes: StoredPrefixes, served_model: ServedModel, backend: PacedBackend, finder: PrefixFinder,
    store: ArtifactStore, loaded: LoadedModel, tmp_path: Path,
) -> None:  # fmt: skip
    mine = publish(store, loaded, DOCUMENT)
    app = create_app(served_model, backend, finder=finder, prefixes=prefixes, settings=SETTINGS)
    with serve(measured(app)) as served:
        question = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere?"}]
        served.client().chat.completions.create(model="tiny", messages=question, max_tokens=3)
        other = [{"role": "user", "content": "Something else"}]
        served.client().chat.completions.create(model="tiny", messages=other, max_tokens=3)
        found, log = browse(f"{served.url}/measure", tmp_path / "profile")
    assert [one["inner"] for one in found] == list(WIDTHS)
    for one in found:
        assert one["wide"] <= one["inner"]
        assert (one["state"], one["shown"], one["door"]) == ("live", True, False)
        assert "50.0 %prefix hits" in one["tiles"]
        assert "1engine0answers being computed" in one["tiles"]
        assert re.search(r"1prefixes in memory\d+\.\d KiBmemory of prefixes", one["tiles"])
        assert re.search(r"ready\d+\d+\.\d KiB\d+\.\dx\d+\.\d %", one["prefixes"])
        assert one["lines"] == 1, "a word of a name is not broken"
        assert one["overflow"] == "auto" and (one["beyond"] > 0) == (one["inner"] == WIDTHS[0])
        assert "no_artifact1" in one["misses"]
        assert mine.id[:12] in one["prefixes"]
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []


@pytest.mark.parametrize("given", ["", "sk-alpha"])
def test_what_it_shows_with_keys(
    prefixes: StoredPrefixes, served_model: ServedModel, backend: PacedBackend, finder: PrefixFinder,
    store: ArtifactStore, tmp_path: Path, given: str,
) -> None:  # fmt: skip
    keys = KeyRing((key("alpha"), key("beta")))
    app = create_app(served_model, backend, finder=finder, prefixes=prefixes, keys=keys, settings=SETTINGS)
    with serve(measured(app)) as served:
        found, _ = browse(f"{served.url}/measure?key={given}", tmp_path / "profile")
    theirs = {entry.id[:12]: entry.namespace for entry in store.entries()}
    assert set(theirs.values()) >= {"alpha", "beta"}
    for one in found:
        assert one["wide"] <= one["inner"]
        assert (one["shown"], one["door"]) == ((True, False) if given else (False, True))
        assert one["state"] == ("live" if given else "needs a key")
        shown = {namespace for name, namespace in theirs.items() if name in one["prefixes"]}
        assert shown == ({"alpha"} if given else set())
        assert "engine" not in one["tiles"]


def test_a_store_that_is_away_does_not_look_empty(
    prefixes: StoredPrefixes, served_model: ServedModel, backend: PacedBackend, finder: PrefixFinder,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    async def away(*_: Any) -> Any:
        raise CatalogUnavailable("redis://kv.example does not answer")

    monkeypatch.setattr(StoredPrefixes, "page", away)
    app = create_app(served_model, backend, finder=finder, prefixes=prefixes, settings=SETTINGS)
    with serve(measured(app)) as served:
        found, _ = browse(f"{served.url}/measure", tmp_path / "profile")
    for one in found:
        assert one["state"] == "live" and one["wide"] <= one["inner"]
        assert one["prefixes"] == "store_unavailable: the store of prefixes does not answer"
