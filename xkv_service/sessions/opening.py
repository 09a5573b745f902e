"""Open sessions: from an artifact, or over an exact cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xkv_service.decoding.cache import XKVCache
from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.models import LoadedModel, context_window
from xkv_service.selection.spec import SelectionSpec
from xkv_service.sessions.exact import exact_cache
from xkv_service.sessions.recovering import recover_renderer
from xkv_service.sessions.rendering import ChatRenderer
from xkv_service.sessions.session import Session
from xkv_service.sessions.source import Source

if TYPE_CHECKING:
    from xkv_artifacts.store import ArtifactStore


def open_session(
    loaded: LoadedModel,
    store: ArtifactStore,
    artifact_id: str,
    selection: SelectionSpec | None = None,
    *,
    renderer: ChatRenderer | None = None,
) -> Session:
    """A session over a stored prefix.

    Args:
        renderer: has the document, system prompt and template that the prefix was made with; a renderer
            without a document, or None: the document is taken from the artifact's tokens.

    Raises:
        ArtifactNotFound, CorruptArtifact: the store has no such artifact, or a damaged one.
        ModelMismatch, InvalidSpec, UnsupportedModel: as `XKVCache.from_artifact`.
        InvalidPrompt: the document does not come back from the tokens.
    """
    cache = XKVCache.from_artifact(loaded.model, store, artifact_id, selection)
    if renderer is None or renderer.document is None:
        system_prompt = None if renderer is None else renderer.system_prompt
        ids = cache.prefix.token_ids.tolist()
        renderer = recover_renderer(loaded.tokenizer, ids, system_prompt)
    return Session(
        loaded.model,
        loaded.tokenizer,
        cache,
        document=renderer.document,
        system_prompt=renderer.system_prompt,
        template=renderer.template,
        source=Source(loaded.identity, artifact_id),
    )


def open_exact_session(loaded: LoadedModel, renderer: ChatRenderer, prefix_ids: list[int]) -> Session:
    """A session over the exact cache of a prefix, which is prefilled now.

    Args:
        renderer: has the document. prefix_ids: the tokens that each of its conversations starts with.

    Raises:
        InvalidPrompt: the prefix fills the model's context window.
    """
    window = context_window(loaded.model.config)
    if window is not None and len(prefix_ids) >= window:
        raise InvalidPrompt(
            f"the document has {len(prefix_ids):,} tokens, and the model's context window {window:,}",
            hint="use a shorter document, or a model with a longer window",
        )
    return Session(
        loaded.model,
        loaded.tokenizer,
        exact_cache(loaded.model, prefix_ids),
        prefix_ids=prefix_ids,
        document=renderer.document,
        system_prompt=renderer.system_prompt,
        template=renderer.template,
        source=Source(loaded.identity),
    )
