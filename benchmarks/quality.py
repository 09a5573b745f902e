"""Merge what `xkv eval --out` wrote (shards, seeds, methods), print a table, draw accuracy against ratio.

    xkv eval --per-document 24 --methods xkv:group=1,ratio=8 xkv:group=4,ratio=8 --out first.json
    python benchmarks/quality.py first.json --out merged.json --plot quality.png

A line of the plot is a method with its options, `ratio` and `budget` left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from report import table

from xkv_service.evaluation.results import AVERAGE, BASELINE, from_json, merge

Row = Mapping[str, Any]


def main() -> None:
    """Read, merge, print, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="write everything merged, as JSON")
    parser.add_argument("--plot", type=Path, help="draw accuracy against ratio, as PNG")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    results = merge([from_json(json.loads(path.read_text("utf-8"))) for path in arguments.files])
    rows = results.rows()
    print(table([_shown(row) for row in rows]))
    if arguments.out:
        arguments.out.write_text(json.dumps(results.to_json(marks=True)) + "\n", "utf-8")
    if arguments.plot:
        draw(rows, arguments.plot, arguments.title)


def _shown(row: Row) -> dict[str, str]:
    cells = {"task": row["task"], "length": f"{row['length']:,}", "method": f"`{row['method']}`"}
    if "note" in row:
        return {**cells, "accuracy": row["note"]}
    cells["accuracy"] = f"{row['accuracy']:.3f} ± {row['standard_error'] or 0:.3f}"
    paired = f"{row['difference']:+.3f} ± {row['difference_error'] or 0:.3f}"
    cells["to full"] = "" if row["method"] == BASELINE else paired
    if "by_turn" in row:
        cells["by turn"] = " ".join(f"{turn['accuracy']:.3f}" for turn in row["by_turn"])
    return {**cells, "ratio": f"{row['ratio']:.2f}x", "n": f"{row['n']:,}"}


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """One panel for each task and length: accuracy with its standard error against bytes_full / bytes."""
    measured = [row for row in rows if "note" not in row and row["task"] != AVERAGE]
    panels = list(dict.fromkeys((row["task"], row["length"]) for row in measured))
    width = 5.5 * len(panels) + 1
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, [row for row in measured if (row["task"], row["length"]) == panel])
        axis.set_title(f"{panel[0]}, {panel[1]:,} tokens", fontsize=10)
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(_series(row) for row in rows):
        points = sorted((row for row in rows if _series(row) == name), key=lambda row: row["ratio"])
        if name == BASELINE:
            axis.axhline(points[0]["accuracy"], color="grey", linestyle=":", label=BASELINE)
            continue
        axis.errorbar(
            [point["ratio"] for point in points],
            [point["accuracy"] for point in points],
            [point["standard_error"] or 0 for point in points],
            marker="o", markersize=4, capsize=2, linewidth=1.5, label=name,
        )  # fmt: skip
    axis.set_xlabel("bytes of the exact cache / bytes stored, everything counted")
    axis.grid(alpha=0.3)
    axis.set_ylim(-0.03, 1.05)


def _series(row: Row) -> str:
    """The method without the options that move a point along its line."""
    name, _, options = row["method"].partition(":")
    kept = [option for option in options.split(",") if not re.match(r"(ratio|budget)=", option)]
    return f"{name}:{','.join(kept)}" if any(kept) else str(name)


if __name__ == "__main__":
    main()
