"""What every benchmark writes: the machine, the versions, the rows measured, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "ray", "redis", "safetensors", "xkv-service")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def command(merged: Sequence[Path] | None = None) -> str:
    """What was run, for a report. The names of merged parts say nothing and are left out, and so are folders
    of this machine: a path in the repository begins there, and of others the name is told."""
    script, *arguments = map(_placeless, sys.argv)
    if not merged:
        return shlex.join(["python", script, *arguments])
    return f"python {script} --part I/N for {len(merged)} parts, then --merge"


def _placeless(argument: str) -> str:
    """An argument, or the value behind its `=`, without the folders above the repository."""
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(_REPOSITORY)
    return f"{name}{equals}{path.relative_to(_REPOSITORY) if inside else path.name}"


def measured_on(merged: Sequence[Path] | None = None) -> dict[str, Any]:
    """The machine and versions of merged parts; nothing where nothing is merged."""
    for path in merged or ():
        part = json.loads(path.read_text())
        if "machine" in part:
            return {"measured_on": part["machine"], "measured_with": part["versions"]}
    return {}


@dataclass
class Report:
    """One benchmark's result.

    Args:
        name: the benchmark's name and its file's. command: what was run.
        baseline: what the ratios in the rows are ratios to, measured in the same process.
    """

    name: str
    command: str
    baseline: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    _partial: Path | None = None
    _extra: dict[str, Any] = field(default_factory=dict)

    def keep(self, path: Path, **extra: Any) -> None:
        """Write each further row at once, to `path` with .partial.json, which `write` makes `path` of.

        A run that is ended leaves that file, and an earlier result at `path` as it was.
        """
        self._partial, self._extra = path.with_suffix(".partial.json"), extra

    def add(self, **row: Any) -> None:
        """One row, printed at once so that a long run can be watched."""
        self.rows.append(row)
        print("  ".join(f"{key}={_shown(value)}" for key, value in row.items()), flush=True)
        if self._partial is not None:
            self._save(self._partial, {**self._extra, "unfinished": True})

    def write(self, path: Path, **extra: Any) -> None:
        """Print the table and write everything to `path` as JSON."""
        print("\n" + table(self.rows))
        self._save(path, {**self._extra, **extra})
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
        print(f"\nwritten to {path}")

    def _save(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        result = {
            "benchmark": self.name,
            "command": self.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "baseline": self.baseline,
            "rows": self.rows,
            **extra,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        written.replace(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
