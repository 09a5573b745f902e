"""Charts over layers as SVG: shaded cells, and bars over groups."""

from __future__ import annotations

import math
from collections import defaultdict

from xkv_service.calibration.report.charts import Heat, Side, Stacks, ticks
from xkv_service.calibration.report.markup import Markup, element, joined
from xkv_service.calibration.report.numbers import span

_WIDTH, _RIGHT, _LEFT = 400.0, 6.0, 58.0
_ROW, _STRIP, _BARS = 30.0, 34.0, 96.0
_SHADES = 12
_MOST_NUMBERED = 8
_DARK = 0.75
_LABEL_WIDTH, _LETTER = 26.0, 8.4
"""Of text as large as on a phone (`style`)."""


def draw_heat(chart: Heat) -> Markup:
    """Cells; numbered where there are few, with a scale of shades beneath."""
    columns = len(chart.columns)
    wide = (_WIDTH - _LEFT - _RIGHT) / columns
    high = _ROW if chart.rows else wide
    base = 4 + high * len(chart.cells)
    height = base + 62
    return element(
        "svg",
        element("title", chart.title),
        *_shaded(chart, wide, high),
        *(_outline(first, count, wide, high) for first, count in (() if chart.rows else chart.blocks)),
        *_numbers(chart, wide, high),
        *_labels(chart, wide, high, base),
        *_scale(chart, base + 34),
        viewBox=f"0 0 {_WIDTH:g} {height:.0f}", role="img", aria_label=f"{chart.title}. {chart.note}",
        class_=f"chart {chart.side}",
    )  # fmt: skip


def _shaded(chart: Heat, wide: float, high: float) -> list[Markup]:
    """One path for each shade: small, whatever the number of layers."""
    ways: dict[int, list[str]] = defaultdict(list)
    for row, cells in enumerate(chart.cells):
        for column, cell in enumerate(cells):
            if cell is not None:
                ways[round(cell[0] * _SHADES)].append(f"M{column} {row}h1v1h-1z")
    moved = f"translate({_LEFT:g} 4) scale({wide:.4f} {high:.4f})"
    return [
        element("path", d="".join(way), transform=moved, fill_opacity=_opacity(shade), class_="cell")
        for shade, way in sorted(ways.items())
    ]


def _opacity(shade: int) -> float:
    return 0.06 + 0.94 * shade / _SHADES


def _outline(first: int, count: int, wide: float, high: float) -> Markup:
    x, y = _LEFT + first * wide, 4 + first * high
    return element("rect", x=x, y=y, width=count * wide, height=count * high, class_="outline")


def _numbers(chart: Heat, wide: float, high: float) -> list[Markup]:
    if chart.rows or len(chart.columns) > _MOST_NUMBERED:
        return []
    return [
        element(
            "text", cell[1], x=_LEFT + (column + 0.5) * wide, y=4 + (row + 0.5) * high + 4.5,
            class_="middle over" if cell[0] > _DARK else "middle",
        )
        for row, cells in enumerate(chart.cells)
        for column, cell in enumerate(cells)
        if cell is not None
    ]  # fmt: skip


def _labels(chart: Heat, wide: float, high: float, base: float) -> list[Markup]:
    every = max(1, math.ceil(_LABEL_WIDTH / wide))
    parts = [element("text", "layer", x=_LEFT - 7, y=base + 17, class_="axis end")]
    for place in range(0, len(chart.columns), every):
        x, words = _LEFT + (place + 0.5) * wide, str(chart.columns[place])
        parts.append(element("text", words, x=x, y=base + 17, class_="middle"))
        if not chart.rows:
            y = 4 + (place + 0.5) * high + 4.5
            parts.append(element("text", words, x=_LEFT - 7, y=y, class_="end"))
    for place, words in enumerate(chart.rows):
        y = 4 + (place + 0.5) * high + 4.5
        parts.append(element("text", words, x=_LEFT - 7, y=y, class_="end"))
    return parts


def _scale(chart: Heat, top: float) -> list[Markup]:
    wide = 8.0
    low, high = chart.ends
    start = _WIDTH - _RIGHT - len(high) * _LETTER - _SHADES * wide - 8
    squares = [
        element(
            "rect", x=start + shade * wide, y=top, width=wide, height=12, class_="cell",
            fill_opacity=_opacity(shade + 1),
        )
        for shade in range(_SHADES)
    ]  # fmt: skip
    words = [
        element("text", low, x=start - 6, y=top + 11, class_="axis end"),
        element("text", high, x=start + _SHADES * wide + 6, y=top + 11, class_="axis"),
    ]
    return squares + words


def draw_stacks(chart: Stacks) -> Markup:
    """Groups as blocks; keys' bits above them and values' below, if there are any."""
    bars = _BARS if chart.parts else 0.0
    parts, middle = [*_blocks(chart, bars + 8)], bars + 8
    if chart.parts:
        most = max(sum(stack) for stacks in chart.parts.values() for stack in stacks)
        parts += [*_scales(most, middle), *_side(chart, "key", most, middle)]
        parts += _side(chart, "value", most, middle)
    return element(
        "svg", element("title", chart.title), *parts,
        viewBox=f"0 0 {_WIDTH:g} {2 * middle + _STRIP:.0f}", role="img", class_="chart stacks",
        aria_label=f"{chart.title}: {', '.join(span(group) for group in chart.groups)}",
    )  # fmt: skip


def _places(chart: Stacks) -> list[tuple[float, float]]:
    """(left, width) of each group: as wide as it has layers."""
    wide = (_WIDTH - _LEFT - _RIGHT) / sum(map(len, chart.groups))
    gap, left, found = min(4.0, wide / 4), _LEFT, []
    for group in chart.groups:
        found.append((left + gap / 2, len(group) * wide - gap))
        left += len(group) * wide
    return found


def _blocks(chart: Stacks, top: float) -> list[Markup]:
    parts = [element("text", "layers", x=_LEFT - 7, y=top + 22, class_="axis end")]
    for (left, wide), group in zip(_places(chart), chart.groups, strict=True):
        words = span(group)
        parts.append(element("rect", x=left, y=top + 4, width=wide, height=_STRIP - 8, rx=3, class_="block"))
        if len(words) * _LETTER <= wide:
            parts.append(element("text", words, x=left + wide / 2, y=top + 21, class_="middle fine"))
    return parts


def _side(chart: Stacks, side: Side, most: float, middle: float) -> list[Markup]:
    way, from_ = (-1, middle) if side == "key" else (1, middle + _STRIP)
    parts = []
    for (left, wide), group, stack in zip(_places(chart), chart.groups, chart.parts[side], strict=True):
        edge = from_
        for level, bits in enumerate(stack):
            tall = bits / most * _BARS
            top = edge - tall if way < 0 else edge
            words = element("title", f"layers {span(group)}, {side}s: {bits:g} bits in {chart.levels[level]}")
            opacity = 0.3 + 0.7 * (level + 1) / len(stack)
            box = {"x": left, "y": top, "width": wide, "height": tall, "fill_opacity": opacity}
            parts.append(element("rect", words, **box) if bits else joined())
            edge += way * tall
    return [element("g", *parts, class_=f"{side} cell")]


def _scales(most: float, middle: float) -> list[Markup]:
    parts = []
    for bits in ticks(0, most, 3)[1:]:
        for y in (middle - bits / most * _BARS, middle + _STRIP + bits / most * _BARS):
            parts.append(element("path", d=f"M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}", class_="grid"))
            parts.append(element("text", f"{bits:,g}", x=_LEFT - 7, y=y + 4.5, class_="end"))
    where = ((middle - 12, "keys"), (middle + _STRIP + 12, "values"))
    names = [element("text", words, x=_LEFT - 7, y=y + 4.5, class_="axis end") for y, words in where]
    return parts + names


def stack_legend(chart: Stacks) -> Markup:
    """The shades of keys and values by bits of a number."""
    rows = []
    for level, words in enumerate(chart.levels):
        opacity = 0.3 + 0.7 * (level + 1) / len(chart.levels)
        boxes = (
            element("g", element("rect", x=x, y=0, width=13, height=14, fill_opacity=opacity), class_=kind)
            for x, kind in ((0, "key cell"), (15, "value cell"))
        )
        rows.append(
            element(
                "li", element("svg", *boxes, viewBox="0 0 28 14", aria_hidden="true", class_="swatch"), words
            )
        )
    return element("ul", *rows, class_="legend")
