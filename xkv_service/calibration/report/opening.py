"""The top of the report: which model and sample, and what the calibration is worth."""

from __future__ import annotations

from xkv_service.calibration.report.about import model_line, sample_line
from xkv_service.calibration.report.markup import Markup, element, joined
from xkv_service.calibration.report.numbers import GAP, nats, percent, short, times
from xkv_service.calibration.report.reading import (
    Figures,
    Trial,
    Validation,
    decided_ratio,
    items,
)


def opening(figures: Figures, title: str) -> Markup:
    """Heading, sample, the sentence that matters, warnings, and a tile for each ratio."""
    model, sample = model_line(figures), sample_line(figures)
    return element(
        "header",
        element("h1", title),
        element("p", *model, class_="soft") if model else "",
        element("p", *sample, class_="soft") if sample else "",
        *(element("p", one, class_="lead") for one in _sentence(figures)),
        _warnings(figures),
        _tiles(figures),
    )


def _sentence(figures: Figures) -> list[Markup]:
    """The one sentence that matters, if the calibration was measured where choices were made."""
    found, asked = Validation.of(figures), decided_ratio(figures)
    _, best = (found.chosen(asked) if asked is not None else None) or ("", None)
    if asked is None or best is None or best.kl is None:
        return []
    parts: list[object] = [
        f"At {times(asked)} compression the predictions differ from the exact cache’s by ",
        element("strong", f"{nats(best.kl, best.kl_error)}{GAP}nats"),
    ]
    if best.agreement is not None:
        parts += [", and the likeliest token is the same at ", element("strong", percent(best.agreement))]
        parts += [" of positions"]
    return [joined(*parts, ". ", _recipe(found, asked))]


def _recipe(found: Validation, asked: float) -> str:
    """What the fixed recipe does there, or at the highest ratio that it was measured at."""
    if len(found.steps) < 2 or found.steps[0] != "recipe":
        return ""
    first = found.at(asked, "recipe")
    if first is not None and first.kl is not None:
        return f"With the fixed recipe it would be {_outcome(first)}."
    measured = [one for one in found.ratios if (trial := found.at(one, "recipe")) and trial.kl is not None]
    other = found.at(measured[-1], "recipe") if measured else None
    beyond = f" At {times(measured[-1])} it gives {_outcome(other)}." if other else ""
    return f"The fixed recipe could not be measured there.{beyond}"


def _outcome(trial: Trial) -> str:
    parts = [f"{short(trial.kl)}{GAP}nats"] if trial.kl is not None else []
    parts += [percent(trial.agreement)] if trial.agreement is not None else []
    return " and ".join(parts) or "unknown"


def _warnings(figures: Figures) -> Markup:
    found = figures.get("warnings")
    texts = [found] if isinstance(found, str) and found else items(found)
    if not texts:
        return joined()
    listed = element("ul", *(element("li", one) for one in texts))
    return element("div", element("strong", "To know before use"), listed, class_="warning", role="note")


def _tiles(figures: Figures) -> Markup:
    """The calibrated result at every ratio."""
    found, decided = Validation.of(figures), decided_ratio(figures)
    tiles = []
    for asked in found.ratios:
        step, best = found.chosen(asked) or ("", None)
        if best is not None and best.kl is not None:
            agreed = percent(best.agreement) + " same token" if best.agreement is not None else ""
            right = percent(best.answers) + " of answers right" if best.answers is not None else ""
            texts = (f"{short(best.kl)}{GAP}nats", right, agreed, step)
            lines = [element("span", one) for one in texts if one]
            note = element("span", "choices made here") if asked == decided else ""
            kind = "decided" if asked == decided else None
            tiles.append(element("li", element("b", times(asked)), *lines, note, class_=kind))
    return element("ul", *tiles, class_="tiles", aria_label="Result by ratio") if tiles else joined()
