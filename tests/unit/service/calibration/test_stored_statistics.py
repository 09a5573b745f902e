"""What a calibration keeps of its sample, and that later documents are added to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed import random_ids
from measured import calibrated
from transformers import PreTrainedModel

from xkv_artifacts.calibration_format import is_statistic
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration import statistics as module
from xkv_service.calibration.calibrate import split
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.calibration.observed import Observed, calibrated_layers, observe_document
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.statistics import (
    DOCUMENTS,
    Statistics,
    document_digest,
    documents_of,
    statistics_bytes,
)
from xkv_service.calibration.storage import (
    known_documents,
    load_calibration,
    load_statistics,
    save_calibration,
)
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout

CPU = torch.device("cpu")
IDENTITY = ModelIdentity(fingerprint="0" * 64, name="tiny", architecture="Llama", dtype="float32")
SAMPLE = [ProbedPrefix.of_text(str(one), random_ids(80, seed=50 + one).tolist()) for one in range(3)]


@pytest.fixture(scope="module")
def layers(model: PreTrainedModel) -> tuple[LayerLayout, ...]:
    return calibrated_layers(inspect_loaded(model).layout)


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel) -> Calibration:
    return calibrated(model)


@pytest.fixture(scope="module")
def statistics(model: PreTrainedModel) -> Statistics:
    found = Observed.nothing(model, 2)
    for document in SAMPLE:
        observe_document(model, document, found)
    return Statistics(found, frozenset(map(document_digest, SAMPLE)))


def test_what_is_kept_is_what_was_observed(
    statistics: Statistics, calibration: Calibration, layers: tuple[LayerLayout, ...]
) -> None:
    tensors = statistics.to_tensors()
    assert all(map(is_statistic, tensors))
    assert {one.dtype for name, one in tensors.items() if "layer" in name} == {torch.float32}
    back = Statistics.from_tensors(tensors, calibration, layers, 2, CPU)
    assert back.documents == statistics.documents == {document_digest(one) for one in SAMPLE}
    found, was = back.observed, statistics.observed
    assert (found.moments.tokens, found.query_tokens) == (was.moments.tokens, was.query_tokens)
    for kind in KINDS:
        for first in range(3):
            for count in range(1, 4 - first):
                expected = was.moments.gram(kind, first, count)
                torch.testing.assert_close(
                    found.moments.gram(kind, first, count),
                    expected,
                    rtol=1e-6,
                    atol=1e-6 * float(expected.max()),
                )
        torch.testing.assert_close(
            found.moments.kind(kind).sums, was.moments.kind(kind).sums, rtol=1e-5, atol=1e-4
        )
    torch.testing.assert_close(found.queries, was.queries, rtol=1e-5, atol=1e-4)
    for mine, planes in zip(found.planes, was.planes, strict=True):
        assert {tuple(one) for one in mine.tolist()} == {tuple(one) for one in planes.tolist()}


def test_its_size_is_that_of_triangles_in_float32(statistics: Statistics) -> None:
    tensors = statistics.to_tensors()
    kept = sum(one.nbytes for name, one in tensors.items() if ".key." in name or ".value." in name)
    assert kept == statistics_bytes(statistics.observed.moments)
    width = sum(product.shape[0] for product in statistics.observed.moments.keys.products)
    assert kept == 2 * 4 * (width * (width + 1) // 2 + width)


def test_of_a_wide_model_nothing_is_kept(statistics: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert statistics.to_tensors() == {}


def test_fewer_neighbours_can_be_taken_but_not_more(
    statistics: Statistics, calibration: Calibration, layers: tuple[LayerLayout, ...]
) -> None:
    tensors = statistics.to_tensors()
    near = Statistics.from_tensors(tensors, calibration, layers, 1, CPU)
    expected = statistics.observed.moments.gram("key", 1, 2)
    torch.testing.assert_close(
        near.observed.moments.gram("key", 1, 2), expected, rtol=1e-6, atol=1e-6 * float(expected.max())
    )
    with pytest.raises(InvalidSpec, match="keeps no products of 3 neighbouring layers"):
        Statistics.from_tensors(near.to_tensors(), calibration, layers, 2, CPU)


def test_a_store_gives_them_only_when_they_are_asked_for(
    statistics: Statistics, calibration: Calibration, layers: tuple[LayerLayout, ...], tmp_path: Path
) -> None:
    with ArtifactStore.open(str(tmp_path)) as store:
        made = save_calibration(store, calibration, IDENTITY, SAMPLE, statistics)
        bare = save_calibration(store, calibration, IDENTITY, SAMPLE)
        assert (made.version, bare.version) == (2, 1) and made.id != bare.id
        assert load_calibration(store, made.id).to_tensors().keys() == calibration.to_tensors().keys()
        assert known_documents(store, made.id) == statistics.documents
        loaded = load_statistics(store, made.id, layers, 2, CPU)
        assert loaded.observed.moments.tokens == statistics.observed.moments.tokens
        with pytest.raises(InvalidSpec, match="keeps no sums to go on from"):
            known_documents(store, bare.id)
        assert store.calibrations.fault(made.id) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("statistics.layer.1.key.moments"), "1.key.moments is missing"),
        (lambda t: t.update({"statistics.layer.0.queries": torch.zeros(3)}), r"0.queries is .* \[3\]"),
        (lambda t: t["statistics.layer.2.value.mean"].fill_(float("nan")), "2.value.mean .* not finite"),
        (lambda t: t.update({"statistics.counts": torch.tensor([0, 1])}), "counts is .* not two counts"),
        (lambda t: t.pop("statistics.counts"), "counts is missing"),
        (lambda t: t.update({DOCUMENTS: torch.zeros(2, 31, dtype=torch.uint8)}), "statistics.documents is"),
    ],
)  # fmt: skip
def test_statistics_that_are_not_as_they_must_be_are_refused(
    statistics: Statistics,
    calibration: Calibration,
    layers: tuple[LayerLayout, ...],
    change: Callable[[dict[str, torch.Tensor]], object],
    fault: str,
) -> None:
    tensors = {name: one.clone() for name, one in statistics.to_tensors().items()}
    change(tensors)
    with pytest.raises(CorruptArtifact, match=fault):
        Statistics.from_tensors(tensors, calibration, layers, 2, CPU)


def test_known_documents_are_never_held_out() -> None:
    sample = [ProbedPrefix.of_text(str(one), [one + 5] * 20) for one in range(8)]
    digests = {document_digest(one) for one in sample[:6]}
    used, held = split(sample, CalibrationSettings(), digests)
    assert [one.name for one in held] == ["6", "7"] and [one.name for one in used] == list("012345")
    used, held = split(sample, CalibrationSettings(), {document_digest(sample[3])})
    assert len(held) == 2 and sample[3] in used
    with pytest.raises(InvalidSpec, match="every document of the sample is in the earlier calibration"):
        split(sample[:2], CalibrationSettings(), digests)
    assert documents_of({}) == frozenset()
