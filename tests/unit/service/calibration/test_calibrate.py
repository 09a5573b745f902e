"""From a sample of documents to a calibration: choices, refusals, and what is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibrate import calibrate, split
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.limits import ENOUGH
from xkv_service.calibration.observed import Observed, observe_document, reach_of
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.errors import InvalidSpec, ModelMismatch, RatioUnreachable
from xkv_service.factorization.ranks import most_ratio, size_of
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling.prefill import prefill

SETTINGS = CalibrationSettings(
    ratio=4.0, ratios=(2.0, 4.0), group_size=2, most_ratio=3.0, tolerance_documents=1
)


def sample(count: int, tokens: int = 300) -> list[ProbedPrefix]:
    return [ProbedPrefix.of_text(f"text {i}", random_ids(tokens, seed=i).tolist()) for i in range(count)]


@pytest.fixture(scope="module")
def calibrated(model: PreTrainedModel) -> Calibration:
    return calibrate(model, sample(4), SETTINGS)


def test_every_layer_is_in_one_group_and_every_choice_was_measured(calibrated: Calibration) -> None:
    assert [layer for group in calibrated.groups for layer in group.layers] == [0, 1, 2]
    figures = calibrated.figures
    assert set(figures["metrics"]) == set(SETTINGS.weightings)
    kls = {name: one["kl"] for name, one in figures["metrics"].items()}
    assert figures["weighting"] == min(kls, key=kls.__getitem__)
    counted = {"documents": 3, "known": 0, "held_out": 1, "tokens": 3 * (300 - 37 - 4)}
    assert figures["sample"] == {**counted, "observed_probes": 3, "probes": 1}
    assert (figures["stability"]["documents"], figures["stability"]["parts"]) == (3, 3)
    assert figures["chosen_again"] == {"metric": None, "groups": None}  # one document is held out
    warnings = figures["warnings"]
    assert any("Held out to check on: 1 document" in one for one in warnings)
    assert any("drawn again from: 3, 4 is the least" in one for one in warnings)
    kept = figures["stability"]["kept"]["mean"]
    assert any("of the energy that others have" in one for one in warnings) == (kept < ENOUGH)
    assert [row["asked"] for row in figures["validation"]] == [2.0] * 7 + [4.0] * 7
    reached = [row for row in figures["validation"] if "reason" not in row]
    assert {row["step"] for row in reached if row["asked"] == 4.0} >= {
        "calibrated bases",
        "calibrated bases, bits",
    }
    for row in reached:
        assert row["ratio"] >= row["asked"]
        assert row["kl"] >= 0 and 0 <= row["agreement"] <= 1
    assert [len(row) for row in figures["likeness"]["key"]] == [3, 3, 3]


def test_the_same_sample_makes_the_same_calibration(model: PreTrainedModel, calibrated: Calibration) -> None:
    again = calibrate(model, sample(4), SETTINGS).to_tensors()
    assert all(torch.equal(again[name], tensor) for name, tensor in calibrated.to_tensors().items())


def test_what_is_stored_is_what_was_made(calibrated: Calibration, tmp_path: Path) -> None:
    identity = ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32")
    with ArtifactStore.open(str(tmp_path)) as store:
        manifest = save_calibration(store, calibrated, identity, sample(4))
        loaded = load_calibration(store, manifest.id, "0" * 64)
        with pytest.raises(ModelMismatch, match="is of another model: tiny"):
            load_calibration(store, manifest.id, "1" * 64)
    tensors = loaded.to_tensors()
    assert tensors.keys() == calibrated.to_tensors().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in calibrated.to_tensors().items())
    assert (loaded.id, manifest.sample.documents) == (manifest.id, 4)
    assert loaded.figures["weighting"] == calibrated.figures["weighting"]
    assert [group.layers for group in loaded.groups] == [group.layers for group in calibrated.groups]


def test_figures_that_are_no_number_are_stored_as_none(calibrated: Calibration, tmp_path: Path) -> None:
    """A layer whose noise breaks the predictions altogether has an infinite divergence."""
    rows = [{"layer": 0, "divergence": [float("inf"), 0.5], "tolerated": float("nan")}]
    broken = replace(calibrated, figures={"tolerances": rows, "stability": float("inf")})
    identity = ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32")
    with ArtifactStore.open(str(tmp_path)) as store:
        loaded = load_calibration(store, save_calibration(store, broken, identity, sample(2)).id)
    assert loaded.figures == {
        "tolerances": [{"layer": 0, "divergence": [None, 0.5], "tolerated": None}],
        "stability": None,
    }


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "smollm3", "qwen3_next"])
def test_models_of_every_kind_are_calibrated(family: str) -> None:
    """Partial rotary, windows beside, layers without rotary, states beside."""
    model = tiny_model(family)
    settings = replace(SETTINGS, ratio=1.5, ratios=(), weightings=("tolerance+both",))
    found = calibrate(model, sample(2), settings)
    layers = inspect_loaded(model).layout.compressible
    assert [one for group in found.groups for one in group.layers] == [layer.index for layer in layers]
    for layer in layers:
        assert found.planes[layer.index].shape == (layer.kv_heads, layer.head_dim // 2, 2)
    groups = tuple(group.layers for group in found.groups)
    again = Calibration.from_tensors(groups, found.to_tensors(), {}, "")
    assert again.layer_groups(inspect_loaded(model).layout) == found.layer_groups(
        inspect_loaded(model).layout
    )


def test_what_was_observed_adds_up(model: PreTrainedModel) -> None:
    reach = reach_of(inspect_loaded(model).layout, SETTINGS)
    whole, first, second = (Observed.nothing(model, reach) for _ in range(3))
    for number, document in enumerate(sample(3, 80)):
        observe_document(model, document, whole)
        observe_document(model, document, first if number else second)
    first.add(second)
    assert (first.query_tokens, first.moments.tokens) == (whole.query_tokens, whole.moments.tokens)
    for one, other in zip(first.queries, whole.queries, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(first.moments.gram("key", 0, 3), whole.moments.gram("key", 0, 3))


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_documents_are_used_or_held_out_and_none_is_both(count: int) -> None:
    documents = sample(1, 20) * count  # even when all are alike
    used, held = split(documents, CalibrationSettings())
    assert used and held and len(used) + len(held) == count
    names = sample(count, 20)
    used, held = split(names, CalibrationSettings(held_out=0.5))
    assert {one.name for one in used}.isdisjoint(one.name for one in held)
    assert len(held) == count // 2


def test_what_cannot_be_calibrated_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InvalidSpec, match="2 documents at least"):
        calibrate(model, sample(1), SETTINGS)
    told: list[str] = []
    with pytest.raises(RatioUnreachable, match="at 500x: the longest, of 263 tokens, reaches 7x at most"):
        calibrate(model, sample(2), replace(SETTINGS, ratio=500.0), told.append)
    assert told == [], "nothing was observed"


def test_what_is_refused_beforehand_could_not_be_reached(
    model: PreTrainedModel, calibrated: Calibration
) -> None:
    """The bound is above what the calibration reaches, and near it."""
    layout = inspect_loaded(model).layout
    for tokens in (40, 263, 5000):
        most = most_ratio(layout, tokens, SETTINGS.group_size)
        with pytest.raises(RatioUnreachable):
            size_of(layout, tokens, calibrated_spec(most, calibrated), calibration=calibrated)
        within = calibrated_spec(0.8 * most, calibrated)
        assert size_of(layout, tokens, within, calibration=calibrated).ratio >= 0.8 * most


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.5},
        {"ratio": 2000.0},
        {"ratios": (8.0, 0.0)},
        {"most_ratio": float("nan")},
        {"group_size": 0},
        {"tolerance_documents": 0},
        {"held_out": 0.0},
        {"held_out": 0.9},
        {"weightings": ()},
        {"weightings": ("output",)},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(InvalidSpec, match=f"^{name}="):
        CalibrationSettings(**fields)


def test_bases_describe_documents_they_were_not_made_from(
    model: PreTrainedModel, calibrated: Calibration
) -> None:
    """At full rank nothing is lost; the leading directions hold most of what is there."""
    exact = prefill(model, random_ids(200, seed=77))
    for group in calibrated.groups:
        for kind in KINDS:
            read = exact.keys if kind == "key" else exact.values
            x = torch.cat([read(layer).flatten(1) for layer in group.layers], 1)
            basis = group.basis(kind)
            rank = basis.bases.shape[0]
            left = x - x @ basis.projection(rank) @ basis.bases
            assert float(left.norm() / x.norm()) < (1e-3 if rank == x.shape[1] else 0.6)
