"""The report's charts as PNG files. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from xkv_service.analysis.picture import require_matplotlib
from xkv_service.calibration.report.charts import SIDES, Chart, Heat, Lines, Series, Stacks
from xkv_service.calibration.report.numbers import span

_STEPS = ("#7b8491", "#b8530f", "#8a6a00", "#17806d", "#8b4bb3", "#b5306f", "#1f5fa8", "#4d7c0f")
_SIDES = {"key": "#1f5fa8", "value": "#b8530f"}
_SHADES = {"key": "Blues", "value": "Oranges"}
_MARKERS = "os^DvPoX"
_MOST_LABELS = 12
_WIDE, _DPI = 4.6, 160
"""Inches, and dots in one: letters of 9 points are 10 pixels high on a phone that shows 370 in all."""


def draw_picture(chart: Chart, path: Path) -> Path:
    """Draw one chart to a PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    pyplot = require_matplotlib()
    groups_alone = isinstance(chart, Stacks) and not chart.parts
    figure, axes = pyplot.subplots(figsize=(_WIDE, 1.4 if groups_alone else 4.2), layout="constrained")
    try:
        if isinstance(chart, Lines):
            _lines(figure, axes, chart)
        elif isinstance(chart, Heat):
            _heat(figure, axes, chart)
        else:
            _stacks(figure, axes, chart)
        axes.set_title(chart.title, fontsize=11, pad=9)
        figure.savefig(path, dpi=_DPI, format="png")
    finally:
        pyplot.close(figure)
    return path


def _plain(text: str) -> str:
    """Without the sign that begins a formula."""
    return text.replace("$", r"\$")


def _lines(figure: Any, axes: Any, chart: Lines) -> None:
    for series in chart.series:
        _line(axes, chart, series)
    axes.set_xscale("log" if chart.x.log else "linear")
    axes.set_yscale("log" if chart.y.log else "linear")
    for axis, one in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
        axis.set_label_text(one.label)
        axis.set_ticks([where for where, _ in one.ticks], [words for _, words in one.ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_ylim(chart.y.low, chart.y.high)
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower center")


def _line(axes: Any, chart: Lines, series: Series) -> None:
    colour = _STEPS[series.style % len(_STEPS)] if chart.palette == "steps" else _SIDES[chart.palette]
    shown = [max(point.y, chart.y.low) for point in series.points]
    bars = [
        [max(0.0, y - max(point.low, chart.y.low)) for y, point in zip(shown, series.points, strict=True)],
        [max(0.0, point.high - y) for y, point in zip(shown, series.points, strict=True)],
    ]
    axes.errorbar(
        [point.x for point in series.points], shown, bars, color=colour, label=_plain(series.name),
        marker=_MARKERS[series.style % len(_MARKERS)], markevery=max(1, len(shown) // 8), clip_on=False,
        linewidth=3.0 if series.bold else 1.5,
        alpha=1.0 if chart.palette == "steps" else max(0.4, 1 - 0.15 * series.style),
    )  # fmt: skip


def _heat(figure: Any, axes: Any, chart: Heat) -> None:
    cells = [[float("nan") if cell is None else cell[0] for cell in row] for row in chart.cells]
    aspect = "auto" if chart.rows else "equal"
    image = axes.imshow(cells, cmap=_SHADES[chart.side], vmin=0, vmax=1, aspect=aspect)
    every = math.ceil(len(chart.columns) / _MOST_LABELS)
    places = list(range(0, len(chart.columns), every))
    labels = [str(chart.columns[place]) for place in places]
    axes.set_xticks(places, labels)
    axes.set_xlabel("layer")
    if chart.rows:
        axes.set_yticks(range(len(chart.rows)), chart.rows)
    else:
        axes.set_yticks(places, labels)
        for first, count in chart.blocks:
            axes.add_patch(_outline(first, count))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.85).set_ticks([0, 1], labels=chart.ends)


def _outline(first: int, count: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((first - 0.5, first - 0.5), count, count, fill=False, linewidth=1.5)


def _stacks(figure: Any, axes: Any, chart: Stacks) -> None:
    widths = [len(group) for group in chart.groups]
    middles = [sum(widths[:place]) + width / 2 for place, width in enumerate(widths)]
    upright = 90 if len(widths) > _MOST_LABELS else 0
    axes.set_xticks(middles, [span(group) for group in chart.groups], rotation=upright)
    axes.set_xlabel("layers of a group")
    axes.axhline(0, color="#333333", linewidth=1)
    for side in SIDES if chart.parts else ():
        way = 1 if side == "key" else -1
        base = [0.0] * len(widths)
        for level, name in enumerate(chart.levels):
            tall = [way * stack[level] for stack in chart.parts[side]]
            shade = 0.3 + 0.7 * (level + 1) / len(chart.levels)
            bars = {"color": _SIDES[side], "alpha": shade, "label": f"{side}s, {name}"}
            axes.bar(middles, tall, [width - 0.15 for width in widths], base, **bars)
            base = [one + more for one, more in zip(base, tall, strict=True)]
    if not chart.parts:
        axes.bar(middles, [1] * len(widths), [width - 0.15 for width in widths], color="#c9d3df")
        axes.set_yticks([])
        return
    axes.set_ylabel("bits a token: keys up, values down")
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    figure.legend(frameon=False, fontsize=9, ncols=len(chart.levels), loc="outside lower center")
