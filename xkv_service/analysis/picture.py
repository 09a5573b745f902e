"""The picture of an analysis: how alike layers are, and what rank groups of them need. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xkv_service.analysis.report import SIDES, Analysis, Side
from xkv_service.errors import MissingExtra

SUFFIXES = (".png", ".svg", ".pdf")

_COLOURS = {"keys": "#1f5fa8", "values": "#c8601a"}
_ENERGY = 0.95
_BAND = (0.90, 0.99)
_MOST_NUMBERED = 12
_INK = "#333333"


def require_matplotlib() -> Any:
    """The pyplot module, drawing to files only.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("pictures need matplotlib, which is not installed", extra="plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(analysis: Analysis, path: Path) -> None:
    """Write the two panels to a png, svg or pdf file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    pyplot = require_matplotlib()
    style = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#999999"}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(11, 4.6), width_ratios=(1, 1.15), layout="constrained"
        )
        _draw_cka(figure, left, analysis)
        _draw_ranks(right, analysis)
        count = len(analysis.documents)
        figure.suptitle(f"{analysis.model}, {count} document{'s' if count > 1 else ''}", fontsize=11)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _draw_cka(figure: Any, axes: Any, analysis: Analysis) -> None:
    """Keys below the diagonal, values above it."""
    keys, values = (analysis.cka(side)[0] for side in SIDES)
    both = torch.tril(keys, -1) + torch.triu(values, 1)
    shown = both.masked_fill(torch.eye(len(both), dtype=torch.bool), torch.nan)
    image = axes.imshow(shown.numpy(), cmap="YlGnBu", vmin=0, vmax=1)
    axes.set_title("How alike two layers are (linear CKA)", fontsize=11)
    axes.set_xlabel("layer   (above the diagonal: values)")
    axes.set_ylabel("layer   (below the diagonal: keys)")
    ticks = range(0, len(both), max(1, len(both) // 8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(list(ticks), [str(analysis.layers[tick]) for tick in ticks])
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(both) <= _MOST_NUMBERED:
        _number(axes, shown)
    figure.colorbar(image, ax=axes, shrink=0.85, label="0: unrelated, 1: the same but for rotation")


def _number(axes: Any, matrix: torch.Tensor) -> None:
    for row, column in torch.nonzero(~matrix.isnan()).tolist():
        figure = float(matrix[row, column])
        colour = "white" if figure > 0.6 else _INK
        axes.text(column, row, f"{figure:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_ranks(axes: Any, analysis: Analysis) -> None:
    """A line for keys and one for values: mean over the documents, bars from the lowest to the highest."""
    places = list(range(len(analysis.sizes)))
    for side in SIDES:
        _draw_side(axes, places, analysis, side)
    axes.set_title("Rank that holds 95 % of the energy", fontsize=11)
    axes.set_xlabel("layers in a group")
    axes.set_ylabel("share of the group's width, %")
    axes.set_xticks(places, [str(size) for size in analysis.sizes])
    axes.set_xlim(-0.25, len(places) - 0.75)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False, title="shaded: 90 % to 99 %\nbars: lowest and highest document", title_fontsize=9
    )


def _draw_side(axes: Any, places: list[int], analysis: Analysis, side: Side) -> None:
    sizes, colour = analysis.sizes, _COLOURS[side]
    found = [analysis.share_of_width(side, size, _ENERGY) for size in sizes]
    bars = [[100 * (one.mean - one.low) for one in found], [100 * (one.high - one.mean) for one in found]]
    mean = [100 * one.mean for one in found]
    low, high = ([100 * analysis.share_of_width(side, s, e).mean for s in sizes] for e in _BAND)
    axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.errorbar(places, mean, bars, color=colour, marker="o", capsize=3, linewidth=2, label=side)
    for place, figure in zip(places, mean, strict=True):
        beside = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 9, "color": colour}
        axes.annotate(f"{figure:.1f}", (place, figure), **beside)
