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
            ("settings", _settings(manifest.settings)),
            *((_words(name), _value(value)) for name, value in found.figures.items() if value is not None),
            *_index(manifest.figures),
            *certainty(manifest.figures),
        ],
    )
    _validation(manifest.figures, chosen=True)
    _warnings(manifest.figures)


def _settings(settings: Mapping[str, Any]) -> str:
    """Names and values; those that are not set are left out."""
    return "; ".join(f"{_words(name)} {_value(one)}" for name, one in settings.items() if one is not None)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    """A setting or a figure as text."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_words(str(name))} {_value(one)}" for name, one in value.items() if one is not None
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _index(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which layers keep an index, as a line; nothing of a calibration that does not say."""
    from xkv_service.calibration.report.selection import index_line

    found = index_line(figures)
    return [("index", found.replace("\u00a0", " "))] if found else []


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
            *_replaced(result),
            ("metric", str(result.figures["weighting"])),
            ("groups", _partition(result.figures["groups"])),
            *_index(result.figures),
            *certainty(result.figures),
            ("time", f"{result.seconds:.1f} s"),
        ],
    )
    _validation(result.figures)
    _warnings(result.figures)
    errors(result.errors)


def _replaced(result: CalibrationReport) -> list[tuple[str, str]]:
    """What was used until now, and how to go on with it."""
    if result.replaced is None:
        return []
    kept = f"precompute --calibration {result.replaced[:12]}"
    return [("used instead of", f"{result.replaced[:12]} ({kept} uses that still)")]


def _warnings(figures: Mapping[str, Any]) -> None:
    """What is to know before use; figures come from a file."""
    found = figures.get("warnings")
    for text in found if isinstance(found, list) else ():
        warn(str(text))


def _validation(figures: Mapping[str, Any], *, chosen: bool = False) -> None:
    """What was measured at each ratio, of every step or of the chosen ones; answers where any are known."""
    from xkv_service.calibration.report.reading import Validation

    found = Validation.of(figures)
    shown = [(asked, step, trial) for (asked, step), trial in found.trials.items()]
    if chosen:
        shown = [(asked, *best) for asked in found.ratios if (best := found.chosen(asked))]
    heads = ["asked", "step", "KL", "agreement", "right answers"]
    most = max((trial for *_, trial in shown), key=lambda trial: trial.questions or 0, default=None)
    if most is None:
        return
    if not most.questions:
        heads = heads[:-1]
    lines = [
        (
            f"{asked:g}x",
            step,
            "-" if trial.kl is None else f"{trial.kl:.4f}",
            percent(trial.agreement),
            percent(trial.answers),
        )[: len(heads)]
        for asked, step, trial in shown
    ]
    table(heads, lines, right=heads[2:])
    if most.questions:
        rows("", [("questions", f"{most.questions:g}, with the exact cache {percent(most.answers_exact)}")])
