from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from calibration_figures import calibration_figures, trial
from calibration_samples import calibration
from hypothesis import example, given
from hypothesis import strategies as st

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.calibration.metrics import WEIGHTINGS
from xkv_service.calibration.report.about import report_figures
from xkv_service.calibration.report.names import METRIC_NAMES, STEP_NAMES, WORDS
from xkv_service.calibration.report.numbers import nats, percent, short, times
from xkv_service.calibration.report.reading import share
from xkv_service.calibration.report_page import write_plots, write_report
from xkv_service.calibration.steps import STEPS
from xkv_service.errors import MissingExtra

FIGURES = calibration_figures()
STEPS_WITHOUT = ("recipe", "derived index")
HEADINGS = {
    "validation": ("What a ratio costs", "What each decision gained"),
    "metrics": (), "partition": (), "groups": (), "settings": (), "sample": (), "model": (), "weighting": (),
    "plans": (),
    "tolerances": ("What noise each layer stands",),
    "likeness": ("Which layers are alike",),
    "spectra": ("How few directions are needed",),
    "selection": ("Which tokens are looked at",),
    "stability": ("If the sample had been another",), "chosen_again": (),
    "thresholds": ("Fidelity that is usual",),
    "warnings": ("To know before use",),
}  # fmt: skip


def report(figures: dict[str, Any], folder: Path, **options: Any) -> str:
    path = folder / "report.html"
    write_report(figures, path, **options)
    return path.read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """What is read, without the places where a line may break."""
    return unescape(page.replace("<wbr>", ""))


def drawings(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def test_shows_every_part_with_its_figures(tmp_path: Path) -> None:
    page = words_of(report(FIGURES, tmp_path))
    for headings in HEADINGS.values():
        assert all(heading in page for heading in headings)
    for row in FIGURES["validation"]:
        if "kl" in row:
            assert nats(row["kl"], row["kl_error"]) in page
            assert percent(row["agreement"]) in page and times(row["ratio"]) in page
    assert "ratio=48 cannot be reached" in page and "recipe at 48x" in page
    assert "these have a selection index: 0, 2, 4" in page and "83.4\u00a0%" in page
    assert "12\u00a0documents" in page and "48,123\u00a0tokens" in page and "24\u00a0probes" in page
    assert (
        "Few documents: standard errors are wide." in page
        and "93.7\u00a0% (92.1\u00a0% to 95.1\u00a0%)" in page
    )


def test_opens_with_the_result_where_choices_were_made(tmp_path: Path) -> None:
    lead = re.search(r'<p class="lead">(.*?)</p>', report(FIGURES, tmp_path))
    rows = {row["step"]: row for row in FIGURES["validation"] if row["asked"] == 20.0}
    last, recipe = rows["calibrated bases, bits"], rows["recipe"]
    words = re.sub("<.*?>", "", unescape(lead.group(1)) if lead else "")
    assert words == (
        f"At 20x compression the predictions differ from the exact cache’s by "
        f"{nats(last['kl'], last['kl_error'])}\u00a0nats, and the likeliest token is the same at "
        f"{percent(last['agreement'])} of positions. With the fixed recipe it would be "
        f"{short(recipe['kl'])}\u00a0nats and {percent(recipe['agreement'])}."
    )


def test_a_gain_that_rounds_to_nothing_is_none(tmp_path: Path) -> None:
    rows = [
        {"asked": 20.0, "step": step, **trial(kl), "kl_error": 1e-9}
        for step, kl in (("recipe", 0.1000), ("derived index", 0.0996), ("bits", 0.08))
    ]
    page = report({"validation": rows}, tmp_path)
    assert "about the same" in page and "1.0x" not in page


def test_right_answers_are_drawn_where_any_are_known(tmp_path: Path) -> None:
    page = words_of(report(FIGURES, tmp_path))
    assert "Of 24\u00a0questions those whose every token" in page
    assert "The exact cache has 95.8\u00a0%" in page and "of answers right" in page
    rows = [{k: v for k, v in row.items() if "answers" not in k} for row in FIGURES["validation"]]
    before = words_of(report({**FIGURES, "validation": rows}, tmp_path))
    assert "Right answers</b>" in page and "Right answers</b>" not in before
    assert "of answers right" not in before and "% right" not in before.split("<h2>What the words")[0]


def test_names_the_recipe_where_it_was_measured(tmp_path: Path) -> None:
    page = unescape(report({**FIGURES, "settings": {"ratio": 48.0}}, tmp_path))
    recipe = next(row for row in FIGURES["validation"] if row["asked"] == 20.0)
    assert "The fixed recipe could not be measured there. At 20x it gives " + short(recipe["kl"]) in page


def test_tells_a_ratio_that_is_not_the_one_asked_for(tmp_path: Path) -> None:
    rows = [{"asked": 8.0, "step": step, **trial(0.1), "ratio": at} for step, at in (("a", 8.1), ("b", 9.8))]
    assert re.findall(r"stored at [\d.]+x", report({"validation": rows}, tmp_path)) == ["stored at 9.8x"]


@pytest.mark.parametrize("best", sorted(STEPS))
def test_the_chosen_step_is_the_one_that_documents_are_compressed_with(best: str, tmp_path: Path) -> None:
    rows = [{"asked": 20.0, "step": step, **trial(1e-4 if step == best else 1e-2)} for step in STEPS]
    free = [{"asked": 20.0, "step": step, **trial(1e-6)} for step in ("recipe", "derived index")]
    figures = {"validation": [*free, *rows]}
    spec = best_spec(20.0, Calibration((), {}, figures, id="a"))
    assert {"basis": spec.basis, "factor_dtype": spec.factor_dtype} == STEPS[best]
    page = report(figures, tmp_path)
    row = next(one for one in page.split("<tr>") if "✓ chosen" in one)
    assert row.startswith(f'<th scope="row">{best}<')
    assert nats(1e-4, 2e-5) in page.split('<ul class="tiles"')[0]


def test_marks_what_was_chosen(tmp_path: Path) -> None:
    page = report(FIGURES, tmp_path).split("What was tried")[1]
    rows = [row for row in page.split("<tr>") if "✓ chosen" in row]
    assert len(rows) == 2
    assert "tolerance+both" in words_of(rows[0]) and "searched" in rows[1]


def test_equal_groups_leave_the_fixed_ones_chosen(tmp_path: Path) -> None:
    page = report({"partition": {"fixed": trial(0.1), "chosen": trial(0.1)}}, tmp_path)
    assert "fixed" in next(row for row in page.split("<tr>") if "✓ chosen" in row)


def test_says_which_choices_are_within_two_errors(tmp_path: Path) -> None:
    close, far = {**trial(0.0029), "kl_error": 0.0004}, {**trial(0.0031), "kl_error": 0.0004}
    page = report(
        {"weighting": "best", "metrics": {"best": trial(0.0019), "close": close, "far": far}}, tmp_path
    )
    rows = {row.split("<")[0]: row for row in page.split('<th scope="row">')}
    assert "within 2 errors" in rows["close"]
    assert "within 2 errors" not in rows["far"] and "within 2 errors" not in rows["best"]


@pytest.mark.parametrize(
    ("kl", "error", "said"),
    [
        (0.0015, 0.0002, '<small class="good">2.0x less</small>'),
        (0.0022, 0.0002, "<small>within 2 errors</small>"),
        (0.0060, 0.0002, '<small class="bad">2.0x more</small>'),
        (0.0015, None, "<small>2.0x less</small>"),
        (0.0030, None, "<small>the same</small>"),
    ],
)
def test_a_step_is_better_beyond_two_errors(
    kl: float, error: float | None, said: str, tmp_path: Path
) -> None:
    before = {"asked": 20.0, "step": "recipe", **trial(0.003), "kl_error": 0.0004}
    after = {"asked": 20.0, "step": "derived index", **trial(kl), "kl_error": error}
    assert said in report({"validation": [before, after]}, tmp_path)


def test_names_and_words_are_explained(tmp_path: Path) -> None:
    every = {**FIGURES, "metrics": {name: trial(0.002) for name in WEIGHTINGS}}
    page = words_of(report(every, tmp_path))
    assert STEP_NAMES.keys() == {*STEPS, *STEPS_WITHOUT} and METRIC_NAMES.keys() == set(WEIGHTINGS)
    for name, meaning in {**METRIC_NAMES, **WORDS}.items():
        assert f"<dt>{name}</dt><dd>{meaning}</dd>" in page
    for name, meaning in STEP_NAMES.items():
        assert f"<span>{name}<small>{meaning}</small></span>" in page
    assert "By more than 2 standard errors" in page


def test_the_model_and_the_sample_are_named(tmp_path: Path) -> None:
    manifest, _ = calibration()
    found = {**report_figures(manifest), "sample": FIGURES["sample"]}
    page = words_of(re.sub("</?strong>", "", report(found, tmp_path)))
    assert "Model: tiny (Llama, bfloat16, fingerprint ffffffffffff)" in page
    assert f"Sample {manifest.sample.sha256[:12]}, calibrated on 26 November 2026." in page
    for value in (
        manifest.id,
        manifest.model.fingerprint,
        manifest.sample.sha256,
        "2026-11-26T08:00:00+00:00",
    ):
        assert f"<dd>{value}</dd>" in page
    assert "<dt>Documents read</dt><dd>2</dd>" in page and "<dt>Tokens read</dt><dd>80</dd>" in page
    assert "<dt>Probes observed</dt><dd>72</dd>" in page and "<dt>Probes to check on</dt><dd>24</dd>" in page


@pytest.mark.parametrize(
    ("selector", "words"), [("auto", "Selection was on"), ("dense", "Selection was off")]
)
def test_says_whether_tokens_were_selected(selector: str, words: str, tmp_path: Path) -> None:
    assert words in report({"settings": {"selection": {"selector": selector}}}, tmp_path)


@pytest.mark.parametrize("missing", sorted(HEADINGS))
def test_leaves_out_what_is_missing(missing: str, tmp_path: Path) -> None:
    page = report({key: value for key, value in FIGURES.items() if key != missing}, tmp_path)
    assert not any(heading in page for heading in HEADINGS[missing])
    assert all(one in page for key, all_of in HEADINGS.items() if key != missing for one in all_of)


def test_nothing_at_all_is_a_page_that_says_so(tmp_path: Path) -> None:
    page = report({}, tmp_path)
    assert "Not in this calibration: validation" in page and not drawings(page)


EVIL = "<script>alert('1')</script>\"&\x00\u202e"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = replaced(FIGURES)
    page = report(evil, tmp_path, title=EVIL)
    assert "<script" not in page and "\x00" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;") > 10
    for drawing in drawings(page):
        ElementTree.fromstring(drawing)


def replaced(value: Any) -> Any:
    """The same figures with evil added to every word, but for the keys that are looked up."""
    if isinstance(value, dict):
        return {key: one if key == "kind" else replaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [replaced(one) for one in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("layers", [1, 10, 80])
def test_every_drawing_is_valid_and_described(layers: int, tmp_path: Path) -> None:
    found = drawings(report(calibration_figures(layers), tmp_path))
    charts = [svg for svg in map(ElementTree.fromstring, found) if svg.get("role") == "img"]
    assert len(charts) == 12
    assert all(svg.get("aria-label") and svg.findtext("title") for svg in charts)
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" for svg in map(parsed, found))


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def test_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = report(FIGURES, tmp_path)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert not re.search(r"@import|url\(|\ssrc=|\son\w+=", page)
    assert re.findall(r'href="(.*?)"', page) == ["data:,"]


def test_stays_small(tmp_path: Path) -> None:
    assert len(report(calibration_figures(80), tmp_path)) < 400_000


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "key", "<b>", "1e9"]),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(["key", "8", "kl"]), one),
    max_leaves=8,
)
NAMES = ("layer", "layers", "kind", "noise", "divergence", "tolerated", "asked", "step", "kl", "kl_error",
         "agreement", "ratio", "reason", "key", "value", "documents")  # fmt: skip
RECORD = st.dictionaries(st.sampled_from(NAMES), ANYTHING)


@given(
    figures=st.dictionaries(
        st.sampled_from(sorted(FIGURES)), ANYTHING | RECORD | st.lists(RECORD, max_size=3)
    )
)
@example(figures={"metrics": {"layer": {"key": None, "kl": 5e-324}}})
def test_no_figures_break_it(figures: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    page = report(figures, tmp_path_factory.getbasetemp())
    for drawing in drawings(page):
        ElementTree.fromstring(drawing)


SMALL = st.sampled_from(
    [0, 1, 2, 5, -1, 0.0, 0.3, 1.0, 5e-324, 1e-300, 1e300, float("nan"), float("inf"), None, "x"]
)


@given(data=st.data())
def test_odd_numbers_do_not_break_it(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    figures = odd(calibration_figures(3), data)
    for drawing in drawings(report(figures, tmp_path_factory.getbasetemp())):
        assert not re.search(r'="[^"]*\b(nan|inf)\b', drawing)


def odd(value: Any, data: st.DataObject) -> Any:
    """A few of the numbers replaced."""
    where = data.draw(st.lists(st.integers(0, 400), max_size=8))
    places = iter(range(10_000))

    def walk(one: Any) -> Any:
        if isinstance(one, dict):
            return {key: walk(more) for key, more in one.items()}
        if isinstance(one, list):
            return [walk(more) for more in one]
        return data.draw(SMALL) if next(places) in where else one

    return walk(value)


def test_pictures_are_the_charts_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write_plots(FIGURES, tmp_path / "plots")
    assert len(paths) == 13  # the groups have a picture of their own
    assert {path.read_bytes()[:8] for path in paths} == {b"\x89PNG\r\n\x1a\n"}


def test_pictures_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra) as caught:
        write_plots(FIGURES, tmp_path)
    assert "xkv-service[plot]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0, None, "0"),
        (3.9193e-08, None, "3.9 × 10⁻⁸"),
        (9.96e-5, None, "1.0 × 10⁻⁴"),
        (0.0516, None, "0.052"),
        (1.158, None, "1.2"),
        (22120.0, None, "22,000"),
        (2.4e-4, 4.2e-5, "(2.4 ± 0.4) × 10⁻⁴"),
        (0.0075, 0.0015, "0.0075 ± 0.0015"),
        (0.0, 0.02, "0.000 ± 0.020"),
    ],
)
def test_numbers_have_two_digits(value: float, error: float | None, shown: str) -> None:
    assert nats(value, error) == shown.replace(" ", "\u00a0")


def test_nothing_short_of_all_is_shown_as_all() -> None:
    assert percent(1.0) == "100\u00a0%" and percent(0.99999) == ">\u00a099.9\u00a0%"
    assert share(1 - 1e-15) == 1.0 and share(0.999999) == 0.999999
