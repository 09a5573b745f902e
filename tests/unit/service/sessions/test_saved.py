"""A session that was in a file goes on with the very tokens of the one that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import calibrated
from talking import Talker

from xkv_artifacts import session_format
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, StoreError
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, compress
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.errors import CacheMisuse, InvalidSpec, ModelMismatch
from xkv_service.sessions.saved import load_session, save_session
from xkv_service.sessions.settings import GenerationSettings

SHORT = GenerationSettings(max_new_tokens=8)
FAMILIES = ["llama", "gemma3", "qwen3_next", "lfm2", "deepseek_v3", "kimi_linear"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_loaded_session_goes_on_alike(
    talkers: Callable[[str], Talker], store: ArtifactStore, tmp_path: Path, family: str, exact: bool
) -> None:
    talker = talkers(family)
    session = talker.published(store)
    session = session.exact() if exact else session
    save_session(session, tmp_path / "empty")
    assert load_session(tmp_path / "empty", talker.loaded, store).context.ids == session.context.ids
    session.send("Where?", SHORT)
    session.send("And then?", SHORT)
    save_session(session, tmp_path / "talk")
    loaded = load_session(tmp_path / "talk", talker.loaded, None if exact else store)
    assert (loaded.messages, loaded.context.ids) == (session.messages, session.context.ids)
    for question in ("Why?", "No?"):
        expected, found = session.send(question, SHORT), loaded.send(question, SHORT)
        assert (found.text, found.cached_tokens) == (expected.text, expected.cached_tokens)
    for mine, other in zip(session.context.cache.layers, loaded.context.cache.layers, strict=True):
        if getattr(mine, "keys", None) is not None:
            assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_a_folded_session_goes_on_alike(
    talkers: Callable[[str], Talker], store: ArtifactStore, tmp_path: Path, family: str
) -> None:
    talker = talkers(family)
    session = talker.published(store)
    for question, keep in (("Where?", 4), ("And then?", 7)):
        session.send(question, SHORT)
        session.fold(keep=keep, error=0.01)
    save_session(session, tmp_path / "talk")
    loaded = load_session(tmp_path / "talk", talker.loaded, store)
    assert loaded.context.tail_bytes == session.context.tail_bytes
    for question in ("Why?", "No?"):
        expected, found = session.send(question, SHORT), loaded.send(question, SHORT)
        assert (found.text, found.cached_tokens) == (expected.text, expected.cached_tokens)
    _change(tmp_path / "talk", lambda fields, tensors: tensors.pop("fold.0.group.0.key.scales"))
    with pytest.raises(CorruptArtifact, match="fold.0.group.0.key.scales"):
        load_session(tmp_path / "talk", talker.loaded, store)


def test_a_session_over_a_calibrations_bases_goes_on_alike(
    talkers: Callable[[str], Talker], store: ArtifactStore, tmp_path: Path
) -> None:
    talker = talkers("llama")
    ids = talker.factors.token_ids.tolist()
    manifest = save_calibration(
        store, calibrated(talker.model), talker.loaded.identity, [ProbedPrefix.of_text("text", ids)]
    )
    made = load_calibration(store, manifest.id)
    spec = CompressionSpec(
        ratio=2.0, calibration=made.id, basis="calibrated", factor_dtype="mixed", index="derived"
    )
    session = replace(talker, factors=compress(talker.model, ids, spec, made)).published(store)
    session.send("Where?", SHORT)
    session.fold(keep=4, error=0.01)
    session.send("And then?", SHORT)
    save_session(session, tmp_path / "talk")
    loaded = load_session(tmp_path / "talk", talker.loaded, store)
    expected, found = session.send("Why?", SHORT), loaded.send("Why?", SHORT)
    assert (found.text, found.cached_tokens) == (expected.text, expected.cached_tokens)
    store.calibrations.remove(made.id)
    with pytest.raises(ArtifactNotFound):
        load_session(tmp_path / "talk", talker.loaded, store)


@pytest.fixture
def saved(talker: Talker, store: ArtifactStore, tmp_path: Path) -> Path:
    session = talker.published(store)
    session.send("Where?", SHORT)
    save_session(session, tmp_path / "talk")
    return tmp_path / "talk"


def test_another_model_artifact_or_selection_is_refused(
    talker: Talker, store: ArtifactStore, saved: Path, tmp_path: Path
) -> None:
    other = talker.loaded.identity.model_copy(update={"fingerprint": "b" * 64})
    with pytest.raises(ModelMismatch, match="held with tiny"):
        load_session(saved, replace(talker.loaded, identity=other), store)
    with pytest.raises(InvalidSpec, match="not with 000000000000"):
        load_session(saved, talker.loaded, store, artifact_id="0" * 64)
    with pytest.raises(InvalidSpec, match="budget=24"):
        load_session(saved, talker.loaded, store, selection=SelectionSpec(budget=25))
    with pytest.raises(InvalidSpec, match="starts with an artifact"):
        load_session(saved, talker.loaded)
    with ArtifactStore.open(str(tmp_path / "empty")) as empty, pytest.raises(ArtifactNotFound):
        load_session(saved, talker.loaded, empty)


_Fields = dict[str, Any]
_Tensors = dict[str, torch.Tensor]


def _change(path: Path, change: Callable[[_Fields, _Tensors], Any]) -> None:
    """Write the session again with other content and right checksums, as a hostile writer could."""
    manifest, tensors = session_format.load_session(path)
    fields = manifest.model_dump()
    change(fields, tensors)
    path.unlink()
    session_format.save_session(path, session_format.SessionManifest(**{**fields, "tensors": {}}), tensors)


def _tails(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Fields, _Tensors], Any]:
    return lambda fields, tensors: tensors.update({k: change(t) for k, t in tensors.items() if "tail" in k})


def _more(**more: torch.Tensor) -> Callable[[_Fields, _Tensors], Any]:
    return lambda fields, tensors: tensors.update({name.replace("_", "."): t for name, t in more.items()})


HOSTILE: dict[str, tuple[Callable[[_Fields, _Tensors], Any], str]] = {
    "a tail of fewer tokens": (_tails(lambda tail: tail[:-1]), "must be"),
    "a tail of another dtype": (_tails(torch.Tensor.half), "must be"),
    "a layer without tail": (lambda f, t: t.pop("layer.1.tail.keys"), "missing"),
    "a layer too many": (_more(layer_9_tail_keys=torch.zeros(1)), "unknown"),
    "a window of a model without": (_more(layer_0_window_keys=torch.zeros(1)), "unknown"),
    "tokens of another prefix": (lambda f, t: t["tokens"].__setitem__(5, 1), "do not begin"),
    "a longer prefix": (lambda f, t: f.update(prefix_tokens=f["tokens"]), "do not begin"),
    "a selection that is none": (lambda f, t: f.update(selection={"budget": "many"}), "selection"),
    "a selection with more": (lambda f, t: f.update(selection={"exec": 1}), "selection"),
    "a document that is no text": (_more(document=torch.tensor([255], dtype=torch.uint8)), "Unicode"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_together_is_corrupt(
    talker: Talker, store: ArtifactStore, saved: Path, name: str
) -> None:
    change, reason = HOSTILE[name]
    _change(saved, change)
    with pytest.raises(CorruptArtifact, match=reason):
        load_session(saved, talker.loaded, store)


def test_any_flipped_bit_is_found(talker: Talker, store: ArtifactStore, saved: Path) -> None:
    good = saved.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 200)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        saved.write_bytes(bad)
        with pytest.raises(CorruptArtifact, match=str(saved)):
            load_session(saved, talker.loaded, store)


def test_saving_replaces_sessions_and_nothing_else(
    talker: Talker, store: ArtifactStore, saved: Path, tmp_path: Path
) -> None:
    session = load_session(saved, talker.loaded, store)
    session.send("More?", SHORT)
    save_session(session, saved)
    assert load_session(saved, talker.loaded, store).messages == session.messages
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(StoreError, match="is no session"):
        save_session(session, notes)
    assert notes.read_text() == "mine"
    with pytest.raises(StoreError, match="cannot save the session"):
        save_session(session, tmp_path / "none" / "talk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "talk"]


def test_a_session_of_unknown_source_cannot_be_saved(talker: Talker, tmp_path: Path) -> None:
    with pytest.raises(CacheMisuse, match="what its prefix was made from"):
        save_session(talker.session(), tmp_path / "talk")


def test_a_file_that_is_no_session(talker: Talker, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read the session"):
        load_session(tmp_path / "none", talker.loaded)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CorruptArtifact):
        load_session(tmp_path / "text", talker.loaded)
