"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xkv_service.calibration.report.charts import Lines, Point, Series
from xkv_service.calibration.report.markup import Markup, element, joined

MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.6 3.6h-9.2z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.8L4.6-3.6h-9.2z",
    "M-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z",
    "M-5-2.5h10v5h-10z",
)
_WIDTH, _HEIGHT = 400.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 24.0, 30.0, 46.0
_LEAST_GAP = 36.0
_MOST_MARKED = 8


def draw_lines(chart: Lines) -> Markup:
    """The chart, as wide as its box."""
    return element(
        "svg",
        element("title", chart.title),
        *_grid(chart),
        *(_line(chart, one) for one in chart.series),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img", aria_label=f"{chart.title}. {chart.note}",
        class_=f"chart {chart.palette}",
    )  # fmt: skip


def _classes(series: Series) -> str:
    return f"s{series.style % len(MARKERS)}" + (" bold" if series.bold else "")


def _x(chart: Lines, value: float) -> float:
    return _LEFT + chart.x.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(chart: Lines, value: float) -> float:
    return _HEIGHT - _BOTTOM - chart.y.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(chart: Lines) -> list[Markup]:
    base, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        element("text", chart.y.label, x=4, y=14, class_="axis"),
        element("text", chart.x.label, x=right, y=_HEIGHT - 6, class_="axis end"),
        element("path", d=f"M{_LEFT:g} {base:g}H{right:g}", class_="base"),
    ]
    for value, words in chart.y.ticks:
        y = _y(chart, value)
        parts.append(element("path", d=f"M{_LEFT:g} {y:.1f}H{right:g}", class_="grid"))
        parts.append(element("text", words, x=_LEFT - 7, y=y + 4.5, class_="end"))
    last = -_LEAST_GAP
    for value, words in chart.x.ticks:
        x = _x(chart, value)
        if x - last >= _LEAST_GAP:
            parts.append(element("text", words, x=x, y=base + 19, class_="middle"))
            last = x
    return parts


def _line(chart: Lines, series: Series) -> Markup:
    places = [(_x(chart, point.x), _y(chart, point.y)) for point in series.points]
    way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [element("path", d=way, class_="line")]
    every = math.ceil(len(places) / _MOST_MARKED)
    for (x, y), point in list(zip(places, series.points, strict=True))[series.style % every :: every]:
        parts += [_error(chart, x, point), _marker(series.style, x, y, point.words)]
    return element("g", *parts, class_=_classes(series))


def _error(chart: Lines, x: float, point: Point) -> Markup:
    if point.low == point.high:
        return joined()
    low, high = _y(chart, point.low), _y(chart, point.high)
    return element("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_="error")


def _marker(style: int, x: float, y: float, words: str) -> Markup:
    shape = element("title", words)
    return element(
        "path", shape, d=MARKERS[style % len(MARKERS)], transform=f"translate({x:.1f} {y:.1f})", class_="mark"
    )


def legend(chart: Lines, meanings: Mapping[str, str] | None = None) -> Markup:
    """The lines' names, each with its colour, its marker and, where there is one, its meaning."""
    told = meanings or {}
    rows = []
    for series in chart.series:
        drawn = joined(element("path", d="M0 7H28", class_="line"), _marker(series.style, 14, 7, series.name))
        group = element("g", drawn, class_=_classes(series))
        key = element("svg", group, viewBox="0 0 28 14", aria_hidden="true", class_=f"swatch {chart.palette}")
        means = element("small", told[series.name]) if series.name in told else ""
        rows.append(element("li", key, element("span", series.name, means)))
    return element("ul", *rows, class_="legend told" if told else "legend")
