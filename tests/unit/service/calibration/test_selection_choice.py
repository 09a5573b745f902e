"""Which layers have an index of their own: measured on documents held out, and honoured ever after."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import calibrated
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, compress
from xkv_service.calibration import selection_choice
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec, reuse_of
from xkv_service.calibration.probes import Probe, ProbedPrefix
from xkv_service.calibration.recall import measure_recall
from xkv_service.calibration.selection_choice import LIMIT, SHARES, choose_selection
from xkv_service.calibration.selection_trials import Moved, SelectionTrials
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.decoding import kernel_choice
from xkv_service.decoding.prefix import Prefix
from xkv_service.errors import InvalidSpec
from xkv_service.prefilling.prefill import prefill

SETTINGS = CalibrationSettings(ratio=1.5, ratios=(), selection=SelectionSpec(budget=0.3, recent=8))


def held(count: int = 2, tokens: int = 200) -> list[ProbedPrefix]:
    return [ProbedPrefix.of_text(f"text {i}", random_ids(tokens, seed=i).tolist()) for i in range(count)]


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel) -> Calibration:
    return calibrated(model)


def test_what_is_chosen_moves_no_prediction_by_more_than_the_limit(
    model: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection_choice, "HOLDS", 10.0)
    for limit in (LIMIT, 0.05, 10.0):
        monkeypatch.setattr(selection_choice, "LIMIT", limit)
        found = choose_selection(model, held(), calibration, SETTINGS)
        trials = SelectionTrials(model, held(), calibration, 1.5, SETTINGS.selection, SHARES)
        assert found["own"] == trials.moved().as_dict()
        assert found["reused"] == trials.moved(found["reuse"]).as_dict()
        assert found["reused"]["kl"] <= found["own"]["kl"] + limit
    assert found["reuse"] == [1, 2], "no prediction can move by ten nats"
    alone = {row["layer"]: row["kl"] for row in found["alone"]}
    assert alone[1] == trials.moved([1]).kl != found["own"]["kl"]


class Harms:
    """Trials whose divergences are known."""

    def __init__(self, pairs: dict[frozenset[int], float]) -> None:
        self._pairs, self.asked = pairs, list[list[int]]()

    def moved(self, reuse: Collection[int] = (), budget: float | None = None) -> Moved:
        self.asked.append(sorted(reuse))
        kl = self._pairs.get(frozenset(reuse), max(self._pairs.get(frozenset([one]), 0) for one in reuse))
        return Moved(kl, kl, 1.0)


def test_the_set_is_confirmed_together_and_the_worst_are_not_tried() -> None:
    single = {1: 2e-4, 2: 0.7, 3: 1e-4, 4: 3e-4}
    trials = Harms({frozenset([one]): kl for one, kl in single.items()} | {frozenset([1, 3]): 0.3})
    alone = {layer: trials.moved([layer]) for layer in single}
    reuse, moved = selection_choice._together(cast(SelectionTrials, trials), alone, Moved(1e-4, 1e-4, 1.0))
    assert (reuse, moved.kl) == ([3, 4], 3e-4)
    assert trials.asked[4:] == [[3], [1, 3], [3, 4]]


def test_nothing_is_told_where_predictions_do_not_hold_or_nothing_is_left_out(
    model: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    for settings in (
        replace(SETTINGS, selection=SelectionSpec("dense")),
        replace(SETTINGS, selection=SelectionSpec(budget=0.9)),
        replace(SETTINGS, ratio=900.0),
    ):
        assert choose_selection(model, held(), calibration, settings)["reuse"] == []
    monkeypatch.setattr(selection_choice, "HOLDS", 0.0)
    assert "reason" in choose_selection(model, held(), calibration, SETTINGS)


def test_windows_between_the_layers_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    model = tiny_model("gemma2", num_hidden_layers=6, layer_types=types)
    monkeypatch.setattr(selection_choice, "HOLDS", 10.0)
    found = choose_selection(model, held(), calibrated(model), replace(SETTINGS, ratio=1.2))
    assert [row["layer"] for row in found["recall"]] == [0, 2, 4]
    assert [row["layer"] for row in found["alone"]] == [2, 4]


def _with(calibration: Calibration, selection: Any) -> Calibration:
    return replace(calibration, figures={"selection": selection})


def test_compression_honours_the_choice(model: PreTrainedModel, calibration: Calibration) -> None:
    chosen = _with(calibration, {"reuse": [2]})
    factors = compress(model, random_ids(200), calibrated_spec(2.0, chosen), chosen)
    assert set(factors.planes) == {0, 1} and factors.spec.reuse == (2,)
    assert calibrated_spec(2.0, chosen, index="none").reuse == ()
    assert calibrated_spec(2.0, chosen, outlier_chunks=1).reuse == ()
    assert calibrated_spec(2.0, calibration).reuse == (), "as calibrations were before"
    assert "reuse" not in CompressionSpec().canonical()


@pytest.mark.parametrize("figures", [3, None, [], {"reuse": 3}, {"reuse": {"1": 1}}, {}])
def test_figures_that_say_nothing_are_no_choice(calibration: Calibration, figures: Any) -> None:
    assert reuse_of(_with(calibration, figures)) == ()


@pytest.mark.parametrize("reuse", [[0], [9], ["1"], [2, 1], [-1], [[1]]])
def test_figures_that_name_no_layer_are_refused(
    model: PreTrainedModel, calibration: Calibration, reuse: Any
) -> None:
    bad = _with(calibration, {"reuse": reuse})
    with pytest.raises(InvalidSpec, match="reuse"):
        compress(model, random_ids(200), calibrated_spec(2.0, bad), bad)


@pytest.mark.parametrize("kernels", [False, True])
def test_recall_is_the_attention_that_a_choice_keeps(
    model: PreTrainedModel, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the weights of eager attention, in the first layer, where queries depend on nothing else.

    Where kernels could decode it is measured in PyTorch all the same.
    """
    ids, probe = random_ids(120, seed=3), random_ids(1, seed=4)
    lossless = CompressionSpec(rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32")
    exact = prefill(model, ids)
    prefix = Prefix.of(model, compress(model, ids, lossless))
    document = ProbedPrefix("text", tuple(ids.tolist()), (Probe(tuple(probe.tolist()), 1),))
    choices = {budget: SelectionSpec("exact", budget, recent=0) for budget in (1, 10, 120)}
    if kernels:
        monkeypatch.setattr(kernel_choice, "DEVICES", ("cpu",))
        monkeypatch.setattr(kernel_choice, "_has_triton", lambda: True)
    found = measure_recall(prefix, exact, document, choices)
    eager = tiny_model("llama", attn_implementation="eager")
    with torch.no_grad():
        weights = eager(torch.cat([ids, probe])[None], output_attentions=True).attentions[0][0, :, -1]
    sink, prefix_weights = weights[:, :4], weights[:, 4:120]
    for budget in (1, 10):
        best = prefix_weights.amax(0).topk(budget).indices
        kept = (sink.sum(-1) + prefix_weights[:, best].sum(-1) + weights[:, 120]).mean()
        torch.testing.assert_close(found[0][budget], kept[None], atol=1e-4, rtol=1e-4)
    for layer in found.values():
        torch.testing.assert_close(layer[120], torch.ones(1), atol=1e-5, rtol=0)
