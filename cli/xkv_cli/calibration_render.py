"""Calibrations as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xkv_artifacts.calibration_entry import CalibrationEntry
from xkv_cli.render import date, errors, percent, rows, size, table, warn
from xkv_workers.inventory import CalibrationDescription

if TYPE_CHECKING:
    from xkv_workers.calibrate import CalibrationReport


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
            ("groups", _partition(manifest.groups)),
            ("settings", ", ".join(f"{k}={v}" for k, v in manifest.settings.items() if v is not None)),
            *((name.replace("_", " "), str(value)) for name, value in found.figures.items()),
            *certainty(manifest.figures),
        ],
    )
    _warnings(manifest.figures)


def _layers(group: tuple[int, ...]) -> str:
    adjacent = group == tuple(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if adjacent and len(group) > 1 else " ".join(map(str, group))


def certainty(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How sure the plan is, as lines; nothing of a calibration whose sample was not drawn again."""
    from xkv_service.calibration.report.stability import certainty_lines

    return [(name.lower(), text.replace("\u00a0", " ")) for name, text in certainty_lines(figures)]


def _partition(groups: Sequence[Sequence[int]]) -> str:
    return ", ".join(_layers(tuple(group)) for group in groups)


def report(result: CalibrationReport) -> None:
    """The summary of a run of `xkv calibrate`."""
    rows(
        "",
        [
            ("calibration", result.id),
            ("model", result.model),
            ("documents", f"{result.documents:,}, {result.held_out:,} of them only to check it on"),
            ("failed", f"{len(result.errors):,}"),
            ("tokens", f"{result.tokens:,}"),
            ("metric", str(result.figures["weighting"])),
            ("groups", _partition(result.figures["groups"])),
            *certainty(result.figures),
            ("time", f"{result.seconds:.1f} s"),
        ],
    )
    validation = result.figures["validation"]
    table(("asked", "step", "KL", "agreement"), [_step(row) for row in validation], right=("KL", "agreement"))
    _warnings(result.figures)
    errors(result.errors)


def _warnings(figures: Mapping[str, Any]) -> None:
    """What is to know before use; figures come from a file."""
    found = figures.get("warnings")
    for text in found if isinstance(found, list) else ():
        warn(str(text))


def _step(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    asked = f"{row['asked']:g}x"
    if "reason" in row:
        return asked, row["step"], "-", "-"
    return asked, row["step"], f"{row['kl']:.4f}", percent(row["agreement"])
