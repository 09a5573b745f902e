"""What a broken-off calibration leaves, and who goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from xkv_artifacts.blobs import CALIBRATING
from xkv_artifacts.checked_file import lay_out
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration import folds
from xkv_service.calibration.folds import total_of
from xkv_service.calibration.observed import Observed, observe_document, reach_of
from xkv_service.calibration.observed_tensors import observed_of, observed_tensors
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_workers.partial_sums import PartialSums, Tensors, _SumsManifest

SETTINGS = CalibrationSettings(ratio=2.0)
HELD = [ProbedPrefix.of_text("held out", list(range(4, 64)))]
SAMPLE = [ProbedPrefix.of_text(str(seed), [(seed + 3 * n) % 200 + 4 for n in range(60)]) for seed in range(3)]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def observed(loaded: LoadedModel) -> list[Observed]:
    reach = reach_of(inspect_loaded(loaded.model).layout, SETTINGS)
    found = [Observed.nothing(loaded.model, reach) for _ in SAMPLE]
    for one, document in zip(found, SAMPLE, strict=True):
        observe_document(loaded.model, document, one)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


def sums(
    store: ArtifactStore,
    loaded: LoadedModel,
    sample: list[ProbedPrefix] = SAMPLE,
    settings: CalibrationSettings = SETTINGS,
) -> PartialSums:
    layout = inspect_loaded(loaded.model).layout
    return PartialSums(store, loaded.identity.fingerprint, layout, sample, HELD, settings)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_sums_survive_as_tensors(loaded: LoadedModel, observed: list[Observed]) -> None:
    tensors = observed_tensors(observed[0])
    back = observed_of(tensors, inspect_loaded(loaded.model).layout, SETTINGS)
    assert same(observed_tensors(back), tensors)
    assert (back.moments.tokens, back.query_tokens) == (observed[0].moments.tokens, 7)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    total = total_of([back, observed[1]])
    assert same(observed_tensors(back), before) and total.query_tokens == 14


def test_the_next_run_goes_on_from_what_was_written(
    store: ArtifactStore, loaded: LoadedModel, observed: list[Observed]
) -> None:
    first = sums(store, loaded)
    assert not first.done
    for position in (0, 2):
        first.add(position, observed_tensors(observed[position]))
    first._write()  # whatever pause it makes between writes
    second = sums(store, loaded)
    assert second.done == {0, 2}
    assert all(
        same(part, observed_tensors(observed[n])) for part, n in zip(second.parts, (0, 2), strict=True)
    )
    second.remove()
    assert not sums(store, loaded).done


def test_documents_share_parts_where_there_are_few(
    store: ArtifactStore, loaded: LoadedModel, observed: list[Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folds, "_MOST_BYTES", 0)
    first = sums(store, loaded)
    for position in (0, 1, 2):
        first.add(position, observed_tensors(observed[position]))
    first._write()
    both = sums(store, loaded).parts
    assert len(both) == 2 and same(both[1], observed_tensors(observed[1]))
    assert same(both[0], observed_tensors(total_of([observed[0], observed[2]])))


def test_sums_of_another_sample_or_other_settings_are_left_alone(
    store: ArtifactStore, loaded: LoadedModel, observed: list[Observed]
) -> None:
    sums(store, loaded).add(0, observed_tensors(observed[0]))
    assert sums(store, loaded).done == {0}
    assert not sums(store, loaded, SAMPLE[::-1]).done
    assert not sums(store, loaded, settings=CalibrationSettings(ratio=3.0)).done


def test_a_damaged_file_is_begun_again(
    store: ArtifactStore, loaded: LoadedModel, observed: list[Observed]
) -> None:
    sums(store, loaded).add(0, observed_tensors(observed[0]))
    (path,) = Path(store.blobs.url, CALIBRATING).rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    begun = sums(store, loaded)
    assert not begun.done and begun.parts == []


def rename(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("done", "damage"),
    [
        ([0], lambda named: rename(named, "0.counts", "9.counts")),
        ([0], lambda named: rename(named, "0.counts", "x.counts")),
        ([0], lambda named: rename(named, "0.counts", "counts")),
        ([0], lambda named: rename(named, "0.key.sums.1", "0.key.sums.7")),
        ([0], lambda named: {n: t for n, t in named.items() if n != "0.queries.0"}),
        ([0], lambda named: {**named, "0.value.sums.0": torch.zeros(3, dtype=torch.float64)}),
        ([0], lambda named: {**named, "0.counts": torch.tensor([0, 0])}),
        ([0], lambda named: {n.replace("0.", "1.", 1): t for n, t in named.items()}),
        ([0], lambda named: {}),
        ([0, 3], lambda named: named | {n.replace("0.", "3.", 1): t for n, t in named.items()}),
        ([-8], lambda named: named),
        ([0, 1], lambda named: named),
    ],
)  # fmt: skip
def test_a_sealed_file_of_what_no_run_wrote_is_begun_again(
    store: ArtifactStore,
    loaded: LoadedModel,
    observed: list[Observed],
    done: list[int],
    damage: Callable[[Tensors], Tensors],
) -> None:
    """Checksums and header are right; position 3 is the document held out."""
    first = sums(store, loaded)
    first.add(0, observed_tensors(observed[0]))
    named = {f"0.{name}": tensor for name, tensor in first.parts[0].items()}
    first._blobs.put(first._key, lay_out(_SumsManifest(done=tuple(done)), damage(named)).write)
    begun = sums(store, loaded)
    assert not begun.done and begun.parts == []
    begun.add(1, observed_tensors(observed[1]))
    assert sums(store, loaded).done == {1}


def test_sums_in_use_are_never_cleaned_up(
    store: ArtifactStore,
    loaded: LoadedModel,
    observed: list[Observed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xkv_artifacts.store.SUMS_KEPT_S", -1.0)
    sums(store, loaded).add(0, observed_tensors(observed[0]))
    first, second = sums(store, loaded), sums(store, loaded)
    with first.in_use(), second.in_use():
        assert store.collect_orphans().sums == 0 and sums(store, loaded).done == {0}
    assert store.collect_orphans().sums == 1 and not sums(store, loaded).done
