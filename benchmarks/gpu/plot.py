"""Draw what `decode_step.py` measured: tokens a second by context, each side at its largest batch.

python benchmarks/gpu/plot.py benchmarks/results/gpu/decode_step_{32,64,128}.json --out docs/images/decode.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_NAMES = {"full": "full cache", "8x": "factors at 8x", "20x": "factors at 20x"}
_COLORS = {"full": "#7b818c", "8x": "#1f5fa8", "20x": "#177e6b"}


def main() -> None:
    """Read the files, draw, write."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    made = [json.loads(path.read_text("utf-8")) for path in arguments.files]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    sides = [side for side in _NAMES if any(_best(report["rows"], side) for report in made)]
    for number, side in enumerate(sides):
        for place, report in enumerate(made):
            best = _best(report["rows"], side)
            if best is None:
                continue
            where = place + (number - (len(sides) - 1) / 2) * 0.3
            axes.bar(where, best["tokens/s"], 0.25, color=_COLORS[side])
            text = f"{best['tokens/s']:,.0f}\n{best['batch']} sessions"
            axes.annotate(text, (where, best["tokens/s"]), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(made)), [f"{one['rows'][0]['tokens'] // 1024}k tokens each" for one in made])
    axes.set_xlim(-0.55, len(made) - 0.45)
    axes.set_ylabel("tokens a second")
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.bar(0, 0, color=_COLORS[side], label=_NAMES[side]) for side in sides]
    axes.legend(handles=handles, frameon=False, fontsize=9)
    card = made[0]["machine"]["accelerator"]
    axes.set_title(f"A decode step, Llama-3.1-8B shapes, one {card}", fontsize=10, loc="left")
    figure.savefig(arguments.out, dpi=150)


def _best(rows: list[dict[str, Any]], side: str) -> dict[str, Any] | None:
    """The row of most tokens a second."""
    mine = [row for row in rows if row["side"] == side]
    return max(mine, key=lambda row: row["tokens/s"], default=None)


if __name__ == "__main__":
    main()
