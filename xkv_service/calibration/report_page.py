"""The report of a calibration: one HTML page that needs nothing else, or its charts as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkv_service.calibration.report.about import origin
from xkv_service.calibration.report.certainty import certainty, small_print, usual
from xkv_service.calibration.report.charts import Chart, Heat, Lines
from xkv_service.calibration.report.curves import PLURAL, accuracy_charts, spectra_charts
from xkv_service.calibration.report.decisions import choices, every_figure, steps_table
from xkv_service.calibration.report.markup import Markup, element, joined
from xkv_service.calibration.report.names import STEP_NAMES, WORDS, explained
from xkv_service.calibration.report.numbers import percent
from xkv_service.calibration.report.opening import opening
from xkv_service.calibration.report.over_layers import (
    group_chart,
    likeness_charts,
    most_sensitive,
    plan_charts,
    tolerance_charts,
)  # fmt: skip
from xkv_service.calibration.report.selection import selection
from xkv_service.calibration.report.stability import stability
from xkv_service.calibration.report.style import STYLE
from xkv_service.calibration.report.svg_layers import draw_heat, draw_stacks, stack_legend
from xkv_service.calibration.report.svg_lines import draw_lines, legend

TITLE = "Calibration report"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(figures: Mapping[str, Any], path: Path, *, title: str = TITLE) -> None:
    """Write what was measured as one HTML file, without scripts and without anything to fetch.

    Args:
        figures: of a calibration; nothing in them is trusted, and what is missing is left out.
        path: of the file. title: its heading.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(f"<!doctype html>\n{_page(figures, title)}\n", encoding="utf-8")


def write_plots(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report's charts as PNG files; returns their paths.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    from xkv_service.calibration.report.pictures import draw_picture

    folder.mkdir(parents=True, exist_ok=True)
    return [draw_picture(chart, folder / f"{chart.name}.png") for chart in _charts(figures)]


def _charts(figures: Mapping[str, Any]) -> list[Chart]:
    groups = group_chart(figures)
    return [
        *accuracy_charts(figures), *([groups] if groups else []), *plan_charts(figures),
        *tolerance_charts(figures), *likeness_charts(figures), *spectra_charts(figures),
    ]  # fmt: skip


def _page(figures: Mapping[str, Any], title: str) -> Markup:
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return element("html", head, element("body", element("main", *_sections(figures, title))), lang="en")


def _sections(figures: Mapping[str, Any], title: str) -> list[Markup]:
    return [
        opening(figures, title),
        _section("What a ratio costs", _shared_legend(figures), _figures([*accuracy_charts(figures)])),
        _section("What each decision gained", steps_table(figures), every_figure(figures)),
        _section("What was tried", choices(figures)),
        _section("The plan over the layers", _plan(figures)),
        _section("What noise each layer stands", _figures([*tolerance_charts(figures)]), _sensitive(figures)),
        _section("Which layers are alike", _figures([*likeness_charts(figures)])),
        _section("How few directions are needed", _figures([*spectra_charts(figures)])),
        _section("Which tokens are looked at", selection(figures)),
        _section("If the sample had been another", stability(figures)),
        _section("How sure this is", certainty(figures), usual(figures)),
        _section("What the words mean", explained(WORDS, WORDS)),
        _section("Model and sample", origin(figures)),
        _section("Small print", small_print(figures)),
    ]


def _section(heading: str, *parts: Markup) -> Markup:
    """Nothing where there is nothing to show."""
    return element("section", element("h2", heading), *parts) if any(parts) else joined()


def _shared_legend(figures: Mapping[str, Any]) -> Markup:
    charts = accuracy_charts(figures)
    return legend(charts[0], STEP_NAMES) if charts else joined()


def _figures(charts: list[Chart]) -> Markup:
    return element("div", *map(_figure, charts), class_="figures") if charts else joined()


def _figure(chart: Chart) -> Markup:
    caption = element("figcaption", element("b", chart.title), chart.note)
    if isinstance(chart, Lines):
        own = legend(chart) if chart.palette != "steps" else joined()
        return element("figure", caption, draw_lines(chart), own)
    if isinstance(chart, Heat):
        return element("figure", caption, draw_heat(chart))
    return element("figure", caption, draw_stacks(chart), stack_legend(chart) if chart.levels else joined())


def _plan(figures: Mapping[str, Any]) -> Markup:
    """The plan at every ratio; the groups alone where there is none."""
    plans: list[Chart] = [*plan_charts(figures)]
    groups = group_chart(figures)
    return _figures(plans or ([groups] if groups else []))


def _sensitive(figures: Mapping[str, Any]) -> Markup:
    found = [one for one in most_sensitive(figures) if one[2] < 1]
    if not found:
        return joined()
    listed = [f"layer {layer}, {PLURAL[side]}: {percent(part)}" for layer, side, part in found]
    words = "Most sensitive, with the noise that each stands, in shares of its own variance:"
    return joined(element("p", words), element("ul", *(element("li", one) for one in listed), class_="plain"))
