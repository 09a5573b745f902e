"""A kept tail as a session file holds it (docs/format.md), and back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone

import torch

from xkv_artifacts.errors import ForeignTail
from xkv_artifacts.format import TOKENS
from xkv_artifacts.session_format import SessionManifest
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.kept_tails import KeptTail
from xkv_service.engine.tail_writer import LeavingTail
from xkv_service.modeling.models import LoadedModel
from xkv_service.selection.spec import SelectionSpec
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import empty_context
from xkv_service.sessions.tail_tensors import fill_tail, tail_views


def leaving(tail: KeptTail, loaded: LoadedModel) -> LeavingTail:
    """What is to be written of a tail. Nothing is copied, and the prefix behind it may be freed."""
    held = tail.context.fork()  # mended, where a forward was cut short
    cache = held.cache
    manifest = SessionManifest(
        model=loaded.identity,
        artifact=tail.artifact_id,
        selection=asdict(cache.selection) if isinstance(cache, XKVCache) else None,
        tokens=len(held.ids),
        prefix_tokens=held.prefix_tokens,
        folded=(),
        system_prompt=None,
        template="raw",
        messages=(),
        created=datetime.now(timezone.utc),
    )
    tensors = {TOKENS: torch.frombuffer(held.ids, dtype=torch.int32), **tail_views(held)}
    return LeavingTail(manifest, tail.namespace, tail.nbytes, tensors)


@torch.no_grad()
def restored(
    loaded: LoadedModel,
    manifest: SessionManifest,
    tensors: dict[str, torch.Tensor],
    prefix: Prefix | None,
    selection: SelectionSpec,
) -> Context:
    """A context that holds a stored tail.

    Args:
        manifest, tensors: as they were read; that they fit the model is not trusted.
        prefix: what the tail stands behind; None: it is all of the conversation.
        selection: what this engine selects with.

    Raises:
        ForeignTail: it was kept with another selection, or behind another prefix.
        CorruptArtifact: a tensor is missing, unknown or of another shape.
    """
    ids = tensors.pop(TOKENS).tolist()
    expected = (asdict(selection), prefix.tokens) if prefix is not None else (None, 0)
    first = prefix.token_ids.tolist() if prefix is not None else []
    if (manifest.selection, manifest.prefix_tokens) != expected or ids[: len(first)] != first:
        raise ForeignTail("a stored tail stands behind another prefix, or was made with another selection")
    if manifest.folded:
        raise ForeignTail("a stored tail has folded tokens, which no engine makes")
    device = loaded.model.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if prefix is None:
            context = empty_context(loaded.model)
        else:
            context = Context(loaded.model, XKVCache(prefix, selection), first)
        fill_tail(context, ids, tensors)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return context
