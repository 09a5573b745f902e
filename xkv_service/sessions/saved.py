"""Sessions in files: a session that is loaded goes on with the very tokens it would have gone on with."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import Cache

from xkv_artifacts import session_format
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.format import TOKENS
from xkv_artifacts.session_format import DOCUMENT, Message, SessionManifest
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.loading import load_factors
from xkv_service.errors import CacheMisuse, InvalidSpec, ModelMismatch
from xkv_service.modeling.models import LoadedModel
from xkv_service.selection.spec import SelectionSpec
from xkv_service.sessions.exact import exact_cache
from xkv_service.sessions.folded_tensors import fill_folded, folded_counts, folded_tensors
from xkv_service.sessions.session import Session
from xkv_service.sessions.source import Source
from xkv_service.sessions.tail_tensors import fill_tail, tail_tensors

if TYPE_CHECKING:
    from xkv_artifacts.store import ArtifactStore


def save_session(session: Session, path: str | Path) -> None:
    """Write a session to a file, in one step; a session that is there is replaced.

    Raises:
        CacheMisuse: it is not known what the session's prefix was made from, or an answer is not done yet.
        StoreError: the file cannot be written.
    """
    if session.source is None or (session.source.artifact_id is None) != (_selection(session) is None):
        raise CacheMisuse(
            "this session cannot be saved: it does not say what its prefix was made from",
            hint="make it with source=Source(model identity, artifact id)",
        )
    held = session.fork()
    tensors = {TOKENS: torch.tensor(held.context.ids, dtype=torch.int32), **tail_tensors(held.context)}
    cache = held.context.cache
    if isinstance(cache, XKVCache):
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in folded_tensors(cache)}
    if held.renderer.document is not None:
        text = held.renderer.document.encode("utf-8")
        tensors[DOCUMENT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    session_format.save_session(Path(path), _manifest(held, session.source), tensors)


def load_session(
    path: str | Path,
    loaded: LoadedModel,
    store: ArtifactStore | None = None,
    *,
    artifact_id: str | None = None,
    selection: SelectionSpec | None = None,
) -> Session:
    """The session in a file, ready to go on.

    Args:
        loaded: the model it was held with. store: has the prefix's artifact; not needed for an exact prefix,
            which is prefilled again.
        artifact_id, selection: refuse a session with others; None takes what the file says.

    Raises:
        StoreError, CorruptArtifact, UnsupportedFormat: no session can be read from the file.
        ModelMismatch: it was held with another model.
        InvalidSpec: it has another artifact or selection.
        ArtifactNotFound: the store does not have its artifact.
    """
    manifest, tensors = session_format.load_session(Path(path))
    kept = _kept_selection(manifest)
    _check_fit(manifest, kept, loaded, artifact_id, selection)
    ids = tensors.pop(TOKENS).tolist()
    document = tensors.pop(DOCUMENT, None)
    session = Session(
        loaded.model,
        loaded.tokenizer,
        _cache(manifest, kept, ids[: manifest.prefix_tokens], loaded, store),
        prefix_ids=ids[: manifest.prefix_tokens],
        document=None if document is None else _text(document),
        system_prompt=manifest.system_prompt,
        template=manifest.template,
        messages=[message.model_dump() for message in manifest.messages],
        source=Source(loaded.identity, manifest.artifact),
    )
    _fill(session, ids, manifest, tensors)
    return session


def _manifest(session: Session, source: Source) -> SessionManifest:
    selection = _selection(session)
    return SessionManifest(
        model=source.model,
        artifact=source.artifact_id,
        selection=None if selection is None else asdict(selection),
        tokens=len(session.context.ids),
        prefix_tokens=session.context.prefix_tokens,
        folded=folded_counts(session.context.cache),
        system_prompt=session.renderer.system_prompt,
        template=session.renderer.template,
        messages=tuple(Message(**message) for message in session.messages),
        created=datetime.now(timezone.utc),
    )


def _selection(session: Session) -> SelectionSpec | None:
    cache = session.context.cache
    return cache.selection if isinstance(cache, XKVCache) else None


def _kept_selection(manifest: SessionManifest) -> SelectionSpec | None:
    if manifest.selection is None:
        return None
    try:
        return SelectionSpec(**manifest.selection)
    except (TypeError, InvalidSpec) as error:
        raise CorruptArtifact(f"session: its selection is none: {str(error)[:200]}") from None


def _check_fit(
    manifest: SessionManifest,
    kept: SelectionSpec | None,
    loaded: LoadedModel,
    artifact_id: str | None,
    selection: SelectionSpec | None,
) -> None:
    if manifest.prefix_tokens < 1:
        raise CorruptArtifact("session: it has no prefix")
    if manifest.model.fingerprint != loaded.identity.fingerprint:
        raise ModelMismatch(
            f"the session was held with {manifest.model.name} in {manifest.model.dtype}, not with "
            f"{loaded.identity.name} in {loaded.identity.dtype}, or its files have changed",
            hint="load the model that it was held with: --model",
        )
    if artifact_id is not None and artifact_id != manifest.artifact:
        raise InvalidSpec(
            f"the session starts with artifact {str(manifest.artifact)[:12]}, not with {artifact_id[:12]}",
            hint="start a new session for another document",
        )
    if selection is not None and selection != kept:
        raise InvalidSpec(
            f"the session was held with {kept}, not with {selection}",
            hint="leave the selection out to go on with the session's own",
        )


def _cache(
    manifest: SessionManifest,
    selection: SelectionSpec | None,
    prefix_ids: list[int],
    loaded: LoadedModel,
    store: ArtifactStore | None,
) -> Cache:
    """A cache that holds the prefix."""
    if manifest.artifact is None:
        return exact_cache(loaded.model, prefix_ids)
    if store is None:
        raise InvalidSpec("the session starts with an artifact", hint="give the store that holds it")
    factors = load_factors(store, manifest.artifact, model=loaded.model)
    if factors.token_ids[: len(prefix_ids)].tolist() != prefix_ids:
        raise CorruptArtifact("session: its tokens do not begin with those of its artifact")
    return XKVCache.from_factors(loaded.model, factors, selection, tokens=len(prefix_ids))


def _fill(
    session: Session, ids: list[int], manifest: SessionManifest, tensors: dict[str, torch.Tensor]
) -> None:
    folded = {name: tensors.pop(name) for name in list(tensors) if name.startswith("fold.")}
    cache = session.context.cache
    if isinstance(cache, XKVCache):
        fill_folded(cache, manifest.folded, folded)
    elif folded or manifest.folded:
        raise CorruptArtifact("session: an exact cache has no folded tail")
    fill_tail(session.context, ids, tensors)


def _text(document: torch.Tensor) -> str:
    try:
        return document.numpy().tobytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptArtifact("session: its document is not Unicode text") from None
