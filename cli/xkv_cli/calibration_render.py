"""Calibrations as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

from xkv_artifacts.calibration_entry import CalibrationEntry
from xkv_cli.render import date, rows, size, table
from xkv_workers.inventory import CalibrationDescription


def entries(found: Sequence[CalibrationEntry]) -> None:
    """A line for each calibration."""
    table(
        ("id", "model", "documents", "tokens", "groups", "created", "size"),
        [
            (
                entry.id[:12],
                entry.model,
                f"{entry.documents:,}",
                f"{entry.tokens:,}",
                str(entry.groups),
                date(entry.created)[:10],
                size(entry.bytes),
            )
            for entry in found
        ],
        right=("id", "documents", "tokens", "groups", "created", "size"),
    )


def description(found: CalibrationDescription) -> None:
    """Everything about one calibration that is one value."""
    manifest = found.manifest
    sample = manifest.sample
    rows(
        "",
        [
            ("id", manifest.id),
            ("model", f"{manifest.model.name} ({manifest.model.architecture}, {manifest.model.dtype})"),
            ("model fingerprint", manifest.model.fingerprint),
            ("created", date(manifest.created.timestamp())),
            ("sample", f"{sample.documents:,} documents, {sample.tokens:,} tokens"),
            ("sample sha256", sample.sha256),
            ("stored", size(found.bytes)),
            ("groups", ", ".join(_layers(group) for group in manifest.groups)),
            ("settings", ", ".join(f"{k}={v}" for k, v in manifest.settings.items() if v is not None)),
            *((name.replace("_", " "), str(value)) for name, value in found.figures.items()),
        ],
    )


def _layers(group: tuple[int, ...]) -> str:
    adjacent = group == tuple(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if adjacent and len(group) > 1 else " ".join(map(str, group))
