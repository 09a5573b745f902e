"""Draws of a sample: documents that are alike leave the plan where it is, others move it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed import random_ids
from transformers import PreTrainedModel

from xkv_service.calibration import folds as folds_module
from xkv_service.calibration.bootstrap import RESAMPLES, bootstrap, chosen_again
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.figures import PLAN_TOKENS
from xkv_service.calibration.folds import MOST_FOLDS, Folds, fold_count, total_of
from xkv_service.calibration.limits import ENOUGH
from xkv_service.calibration.observed import Observed, observe_document
from xkv_service.calibration.plan import ColumnPlan, factor_bits
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.tolerance import no_tolerances
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.packed_factors import rank_of

SETTINGS = CalibrationSettings(ratio=8.0, group_size=2)
GROUPS = [(0, 2), (2, 1)]


@pytest.fixture(scope="module")
def parts(model: PreTrainedModel) -> list[Observed]:
    """Sums of four documents of 60 random tokens each."""
    found = [Observed.nothing(model, 2) for _ in range(4)]
    for seed, one in enumerate(found):
        observe_document(
            model, ProbedPrefix.of_text(str(seed), random_ids(67, seed=300 + seed).tolist()), one
        )
    return found


@pytest.fixture
def candidates_of(model: PreTrainedModel, parts: list[Observed]) -> Callable[[Observed], Candidates]:
    tolerances = no_tolerances(total_of(parts).moments)
    return lambda found: Candidates(model, found, tolerances, SETTINGS)


def test_documents_that_are_alike_leave_the_plan_where_it_is(
    parts: list[Observed], candidates_of: Callable[[Observed], Candidates]
) -> None:
    found = bootstrap(Folds([parts[0]] * 4, 4), candidates_of, "plain", GROUPS)
    assert found is not None
    assert (found["documents"], found["parts"], found["resamples"]) == (4, 4, RESAMPLES)
    for end in ("mean", "low", "high"):
        assert found["kept"][end] == pytest.approx(1, abs=1e-5)
        assert 0 < found["captured"][end] < 1
    assert [one["share"] for one in found["groups"]] == [1.0]
    assert [(one["layers"], one["kind"]) for one in found["bits"]] == [
        ([0, 1], "key"), ([0, 1], "value"), ([2], "key"), ([2], "value"),
    ]  # fmt: skip
    assert all(one["low"] == one["bits"] == one["high"] > 0 for one in found["bits"])


def test_documents_that_differ_move_it(
    parts: list[Observed], candidates_of: Callable[[Observed], Candidates]
) -> None:
    found = bootstrap(Folds(parts, 4), candidates_of, "plain", GROUPS)
    assert found is not None
    kept = found["kept"]
    assert 0 < kept["low"] <= kept["mean"] <= kept["high"] < 1 and kept["mean"] < ENOUGH
    assert sum(one["share"] for one in found["groups"]) == pytest.approx(1)
    assert any(one["low"] < one["high"] for one in found["bits"])
    assert found == bootstrap(Folds(parts, 4), candidates_of, "plain", GROUPS)


def test_what_is_kept_is_measured_on_the_documents_left_out(
    parts: list[Observed], candidates_of: Callable[[Observed], Candidates]
) -> None:
    """Two parts: a draw of one alone is held against the other, and a draw of both against none."""
    found = bootstrap(Folds(parts[:2], 2), candidates_of, "plain", GROUPS)
    assert found is not None
    expected = []
    for mine, other in ((0, 1), (1, 0)):
        made = candidates_of(parts[mine]).calibration("plain", GROUPS)
        held = own = 0.0
        for group, (first, count) in zip(made.groups, GROUPS, strict=True):
            for kind in KINDS:
                basis = group.basis(kind)
                bits = factor_bits(candidates_of(parts[mine]).layers, SETTINGS.ratio)
                rank = _rank(made, GROUPS.index((first, count)), kind, bits)
                gram = parts[other].moments.gram(kind, first, count)
                weight = torch.block_diag(*[one.double() for m in basis.metric for one in m])
                root = torch.linalg.cholesky(weight)
                held += float(
                    (
                        basis.bases[:rank].double() @ weight @ gram @ weight @ basis.bases[:rank].double().T
                    ).trace()
                )
                own += float(torch.linalg.eigvalsh(root.T @ gram @ root).flip(0)[:rank].sum())
        expected.append(held / own)
    assert found["kept"]["low"] == pytest.approx(min(expected), rel=1e-4)
    assert found["kept"]["high"] == pytest.approx(max(expected), rel=1e-4)


def _rank(made: Calibration, group: int, kind: str, bits: float) -> int:
    runs = ColumnPlan(made, calibrated_spec(SETTINGS.ratio, made), PLAN_TOKENS).runs(bits)
    return rank_of(runs[group][kind == "value"])


def test_what_is_earlier_is_in_every_draw(
    parts: list[Observed], candidates_of: Callable[[Observed], Candidates]
) -> None:
    folds = Folds(parts[:2], 2, total_of(parts[2:]), 2)
    assert folds.total().moments.tokens == sum(one.moments.tokens for one in parts)
    alone = bootstrap(Folds(parts[:2], 2), candidates_of, "plain", GROUPS)
    firmer = bootstrap(folds, candidates_of, "plain", GROUPS)
    assert alone is not None and firmer is not None
    assert firmer["kept"]["mean"] > alone["kept"]["mean"]


def test_one_part_says_nothing(
    parts: list[Observed], candidates_of: Callable[[Observed], Candidates]
) -> None:
    assert bootstrap(Folds(parts[:1], 1), candidates_of, "plain", GROUPS) is None


def test_a_choice_that_every_document_makes_is_made_again() -> None:
    sure = {"one": [0.1, 0.2, 0.3], "other": [0.2, 0.3, 0.4], "short": [0.0]}
    assert chosen_again(sure, "one") == 1.0
    split = chosen_again({"one": [0.0, 0.2], "other": [0.11, 0.11]}, "one")
    assert split is not None and 0.7 < split < 0.8  # lost only where the second document is drawn twice
    assert chosen_again({"one": [0.1], "other": [0.2]}, "one") is None


def test_wide_models_keep_their_sums_in_fewer_parts(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = inspect_loaded(model).layout
    assert fold_count(layout, SETTINGS) == MOST_FOLDS
    size = sum(one.nbytes for one in Observed.nothing(model, 2).moments.keys.products)
    monkeypatch.setattr(folds_module, "_MOST_BYTES", 3 * 2 * size)
    assert fold_count(layout, SETTINGS) == 3
    monkeypatch.setattr(folds_module, "_MOST_BYTES", 1)
    assert fold_count(layout, SETTINGS) == 2
