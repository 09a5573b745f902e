"""The report in a real browser, on a phone and on a desk. Needs Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from calibration_figures import calibration_figures

from xkv_service.calibration.report_page import write_report

CHROMIUM = shutil.which("chromium")
WIDTHS = (360, 1200)
LEGIBLE = 11.0
"""Pixels of the smallest letters on a phone."""
LONG = "a-model-name-without-a-space" * 8
PAGES = {
    "full": calibration_figures(),
    "large": calibration_figures(80),
    "long": {**calibration_figures(1), "model": LONG, "warnings": [LONG], "stability": {LONG: LONG}},
    "empty": {},
}
MEASURE = """<!doctype html><meta charset="utf-8">%s<pre id="found"></pre><script>
onload = () => { found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const cut = [...page.querySelectorAll("svg.chart text")].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  });
  const size = text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;
  const all = [...page.querySelectorAll("svg.chart text")];
  const boxes = [...page.querySelectorAll("table")].flatMap(table =>
    [...table.querySelectorAll("th, td")].filter(cell => cell.scrollWidth > cell.clientWidth + 1));
  return {name: frame.name, letters: Math.min(...all.map(size), 99), over: boxes.map(one => one.textContent),
          wide: root.scrollWidth, inner: frame.contentWindow.innerWidth,
          cut: cut.map(text => text.textContent), heading: page.querySelector("h1").textContent};
})); };
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM once it is loaded, and what the browser wrote."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--dump-dom",
        "--window-size=1280,900",
    ]
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What every page measures at every width, and what the browser wrote."""
    folder = tmp_path_factory.mktemp("browser")
    frames = []
    for name, figures in PAGES.items():
        write_report(figures, folder / f"{name}.html")
        frames += [f'<iframe name="{name}" src="{name}.html" width="{width}"></iframe>' for width in WIDTHS]
    (folder / "measure.html").write_text(MEASURE % "".join(frames))
    dom, log = browse(folder / "measure.html", folder / "profile")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom)
    return json.loads(unescape(found.group(1))) if found else [], log


def test_nothing_is_wider_than_the_screen(browsed: tuple[list[dict[str, Any]], str]) -> None:
    found, _ = browsed
    assert [one["name"] for one in found] == [name for name in PAGES for _ in WIDTHS]
    assert {one["heading"] for one in found} == {"Calibration report"}
    assert {one["inner"] for one in found} == set(WIDTHS)
    assert [one for one in found if one["wide"] > one["inner"]] == []


def test_no_chart_cuts_its_text(browsed: tuple[list[dict[str, Any]], str]) -> None:
    assert [(one["name"], one["cut"]) for one in browsed[0] if one["cut"]] == []


def test_letters_in_charts_are_legible(browsed: tuple[list[dict[str, Any]], str]) -> None:
    assert [one for one in browsed[0] if one["letters"] < LEGIBLE] == []


def test_no_cell_of_a_table_runs_into_the_next(browsed: tuple[list[dict[str, Any]], str]) -> None:
    assert [(one["name"], one["over"]) for one in browsed[0] if one["over"]] == []


def test_the_console_stays_silent(browsed: tuple[list[dict[str, Any]], str]) -> None:
    assert [line for line in browsed[1].splitlines() if "CONSOLE" in line] == []
