"""Each reason why a sample is too small is one line, with the figure that shows it."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_service.calibration.sample_warnings import sample_warnings
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.steps import SHARED
from xkv_service.calibration.validation import NOT_FINITE

SETTINGS = CalibrationSettings()


def figures(
    *,
    documents: int = 12,
    known: int = 0,
    held: int = 4,
    kept: float | None = 0.99,
    again: float | None = 0.8,
    kl: tuple[float | None, ...] = (1e-6, 1e-4),
) -> dict[str, Any]:
    energy = None if kept is None else {"mean": kept, "low": kept - 0.01, "high": kept + 0.01}
    return {
        "sample": {"documents": documents, "known": known, "held_out": held},
        "stability": None if kept is None else {"kept": energy},
        "chosen_again": {"metric": again, "groups": None},
        "validation": [
            {"asked": asked, "step": SHARED, **({"reason": NOT_FINITE} if one is None else {"kl": one})}
            for asked, one in zip((8.0, 20.0, 48.0), kl, strict=False)
        ],
    }


def test_a_sample_that_is_large_enough_warns_of_nothing() -> None:
    assert sample_warnings(figures(), 8, SETTINGS) == []
    assert sample_warnings(figures(documents=9, held=3, kept=0.98, again=0.5, kl=(0.02,)), 4, SETTINGS) == []


@pytest.mark.parametrize(
    ("changed", "parts", "expected"),
    [
        ({"held": 2}, 8, ("Held out to check on: 2 documents, 3 is the least", "Give 12 documents or more.")),
        ({"held": 1}, 8, ("Held out to check on: 1 document, 3 is the least",)),
        ({"documents": 3}, 3, ("drawn again from: 3, 4 is the least: the plan looks surer than it is",)),
        ({}, 2, ("drawn again from 2 parts only, 4 is the least: a model", "no more of 12 documents")),
        ({"kept": 0.975}, 8, ("keep 97.5 % (96.5 % to 98.5 %)", "98.0 % is enough", "Give more documents")),
        ({"again": 0.46}, 8, ("chosen again in 46 % of draws", "50 % is the least")),
        ({"kl": (1e-4, 0.021)}, 8, ("more than 0.02 nats", "at 20x (0.021). Compress to 8x at most",)),
        ({"kl": (0.1, 0.46)}, 8, ("at 8x (0.10), 20x (0.46). Compress less, or give more documents",)),
        ({"kl": (1e-4, 0.03, None)}, 8, ("at 20x (0.030), 48x (not finite). Compress to 8x at most",)),
    ],
)  # fmt: skip
def test_each_reason_is_one_line_with_its_figure(
    changed: dict[str, Any], parts: int, expected: tuple[str, ...]
) -> None:
    (text,) = sample_warnings(figures(**changed), parts, SETTINGS)
    assert all(part in text for part in expected), text
    assert "\n" not in text and "\u00a0" not in text and text.endswith(".")


@pytest.mark.parametrize(
    ("new", "parts", "said"),
    [
        (
            0,
            0,
            "drawn again from: 0 beside 7 of the earlier calibration, which cannot, 4 is the least: it is",
        ),
        (
            1,
            1,
            "drawn again from: 1 beside 7 of the earlier calibration, which cannot, 4 is the least: it is",
        ),
        (2, 2, "drawn again from: 2 beside 7 of the earlier calibration, which cannot, 4 is the least: the"),
    ],
)
def test_documents_of_an_earlier_calibration_cannot_be_drawn(new: int, parts: int, said: str) -> None:
    one_unknown = figures(documents=7 + new, known=7, kept=None)
    (text,) = sample_warnings(one_unknown, parts, SETTINGS)
    assert said in text and text.endswith("Give more new documents.") and "is is" not in text


def test_every_reason_is_told() -> None:
    found = sample_warnings(figures(documents=2, held=1, kept=0.9, again=0.4, kl=(0.5,)), 2, SETTINGS)
    assert [text.split()[0] for text in found] == ["Held", "Documents", "The", "The", "Predictions"]
