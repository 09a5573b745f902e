"""What the commands say of a calibration: how sure it is, and warnings, whatever its figures are."""

from __future__ import annotations

import pytest
from calibration_figures import calibration_figures

from xkv_cli.calibration_render import certainty, report
from xkv_workers.calibrate import CalibrationReport


def test_the_summary_says_how_sure_the_plan_is_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    figures = calibration_figures()
    report(CalibrationReport("f" * 64, "tiny", 16, 4, 48123, None, (), 1.5, figures))
    shown = capsys.readouterr()
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in shown.out.splitlines()}
    assert lines["drawn again"].endswith("20 times, from 8 parts of 12 documents")
    assert "93.7 % (92.1 % to 95.1 %) of what others' own directions hold" in lines["energy kept"]
    assert "in 71 % of draws" in lines["same metric"] and "in 99.3 % of draws" in lines["same groups"]
    assert "used instead of" not in lines
    assert "0–3 | 4–7 | 8–9 in 85 % of draws" in lines["searched groups"]
    assert lines["index"] == "index layers 0, 2, 4, 6, 8 of 10"
    assert "warning Few documents: standard errors are wide." in shown.err


def test_the_summary_tells_right_answers_where_any_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    figures = calibration_figures()
    report(CalibrationReport("f" * 64, "tiny", 16, 4, 48123, None, (), 1.5, figures))
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "asked step KL agreement right answers" in shown
    assert "48x calibrated bases, bits 0.0000 100.0 % 99.9 %" in shown and "48x recipe - - -" in shown
    assert "questions 24, with the exact cache 95.8 %" in shown
    before = [{k: v for k, v in row.items() if k != "questions"} for row in figures["validation"]]
    report(
        CalibrationReport("f" * 64, "tiny", 16, 4, 48123, None, (), 1.5, {**figures, "validation": before})
    )
    assert "right answers" not in capsys.readouterr().out


def test_the_summary_says_which_calibration_was_used_before(capsys: pytest.CaptureFixture[str]) -> None:
    report(CalibrationReport("f" * 64, "tiny", 16, 4, 48123, "ab" * 32, (), 1.5, calibration_figures()))
    shown = " ".join(capsys.readouterr().out.split())
    kept = "precompute --calibration abababababab uses that still"
    assert f"used instead of abababababab ({kept})" in shown


@pytest.mark.parametrize(
    "stability",
    [None, 0.93, [], {}, {"parts": "2"}, {"parts": 2, "documents": 3, "resamples": float("nan")}],
)
def test_a_calibration_whose_sample_was_not_drawn_again_says_nothing(stability: object) -> None:
    assert certainty({"stability": stability}) == []


def test_figures_that_make_no_sense_are_left_out() -> None:
    found = {"parts": 2, "documents": 3, "resamples": 4, "kept": {"mean": "all"}, "groups": [3], "bits": 7}
    assert certainty({"stability": found, "chosen_again": [1]}) == [
        ("drawn again", "4 times, from 2 parts of 3 documents")
    ]
