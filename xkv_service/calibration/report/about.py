"""Which calibration a report is of: its model and its sample, by name and by digest."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_service.calibration.report.markup import Markup, element, joined
from xkv_service.calibration.report.numbers import counted
from xkv_service.calibration.report.reading import Figures, mapping, number

_DIGITS = 12


def report_figures(manifest: CalibrationManifest) -> dict[str, Any]:
    """The figures of a calibration, with what its manifest says of model and sample besides."""
    model, sample = manifest.model, manifest.sample
    about = {
        "id": manifest.id,
        "created": manifest.created.isoformat(timespec="seconds"),
        "architecture": model.architecture,
        "dtype": model.dtype,
        "fingerprint": model.fingerprint,
        "documents": sample.documents,
        "tokens": sample.tokens,
        "sha256": sample.sha256,
    }
    return {**manifest.figures, "model": model.name, "about": about}


def model_line(figures: Figures) -> list[object]:
    """The model, and the first digits of its fingerprint."""
    name, about = _text(figures, "model"), mapping(figures.get("about"))
    named: list[object] = ["Model: ", element("strong", name)] if name else []
    more = [one for key in ("architecture", "dtype") if (one := _text(about, key))]
    if fingerprint := _text(about, "fingerprint"):
        more.append(f"fingerprint {fingerprint[:_DIGITS]}")
    return [*named, f" ({', '.join(more)})"] if named and more else named


def sample_line(figures: Figures) -> list[object]:
    """What was read, as far as it is known."""
    sample, about = mapping(figures.get("sample")), mapping(figures.get("about"))
    used, held = number(sample.get("documents")), number(sample.get("held_out"))
    tokens, probes = number(sample.get("tokens")), number(sample.get("probes"))
    made = [counted(used, "document")] if used is not None else []
    made += [counted(tokens, "token")] if tokens is not None else []
    parts = [f"Made from {' with '.join(made)}. "] if made else []
    if held is not None:
        asked = f" with {counted(probes, 'probe')}" if probes is not None else ""
        parts.append(f"Checked on {counted(held, 'other document')}{asked}. ")
    digest, day = _text(about, "sha256"), _day(about.get("created"))
    named = [f"Sample {digest[:_DIGITS]}"] if digest else []
    named += [f"calibrated on {day}"] if day else []
    return [*parts, f"{', '.join(named)}."] if named else list(parts)


def origin(figures: Figures) -> Markup:
    """Everything that tells this calibration from another, in full."""
    about = mapping(figures.get("about"))
    if not about:
        return joined()
    sample = mapping(figures.get("sample"))
    rows = [
        ("Calibration", _text(about, "id")),
        ("Made", _text(about, "created")),
        ("Model", _text(figures, "model")),
        ("Architecture", _text(about, "architecture")),
        ("Runs in", _text(about, "dtype")),
        ("Fingerprint", _text(about, "fingerprint")),
        ("Documents read", _count(about, "documents")),
        ("Tokens read", _count(about, "tokens")),
        ("Sample SHA-256", _text(about, "sha256")),
        ("Known before", _count(sample, "known")),
        ("Probes observed", _count(sample, "observed_probes")),
        ("Probes to check on", _count(sample, "probes")),
    ]
    return element("dl", *(joined(element("dt", name), element("dd", text)) for name, text in rows if text))


def _text(found: Figures, key: str) -> str:
    value = found.get(key)
    return value if isinstance(value, str) else ""


def _count(found: Figures, key: str) -> str:
    value = number(found.get(key))
    return f"{value:,.0f}" if value else ""


def _day(value: object) -> str:
    """Of a time in ISO 8601; nothing of what is none."""
    try:
        return f"{datetime.fromisoformat(str(value)):%d %B %Y}".lstrip("0")
    except ValueError:
        return ""
