"""Tiny models that can talk: a byte tokenizer with a chat template, a document and its factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from compressed import manifest_of
from families import tiny_model
from transformers import PreTrainedModel

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.prompts import render_prefix
from xkv_service.sessions.opening import open_session
from xkv_service.sessions.rendering import ChatRenderer
from xkv_service.sessions.session import Session

DOCUMENT = "The river Ume rises in the hills, flows by 3 towns and ends in the sea. " * 2
BYTES = 260
SELECTION = SelectionSpec(budget=24, recent=0)


@dataclass(frozen=True)
class Talker:
    """A model, its tokenizer, and the factors of `DOCUMENT`."""

    loaded: LoadedModel
    factors: PrefixFactors

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def published(self, store: ArtifactStore) -> Session:
        """A new session over the factors in a store."""
        manifest = manifest_of(self.factors)
        identity, ids = self.loaded.identity, self.factors.token_ids.tolist()
        name = artifact_id(identity.fingerprint, manifest.namespace, ids, manifest.spec)
        if store.get(name) is None:
            fitting = manifest.model_copy(update={"model": identity, "id": name})
            store.publish(fitting, self.factors.to_tensors())
        renderer = ChatRenderer(self.tokenizer, DOCUMENT)
        return open_session(self.loaded, store, name, SELECTION, renderer=renderer)

    def session(self, **options: Any) -> Session:
        """A new session over the factors."""
        cache = XKVCache.from_factors(self.model, self.factors, SELECTION)
        return Session(self.model, self.tokenizer, cache, **{"document": DOCUMENT, **options})


def make_talker(family: str, tokenizer: Any) -> Talker:
    """The talker of a family of `families.py`."""
    fields = {"vocab_size": BYTES, "max_position_embeddings": 1024, "eos_token_id": 0, "pad_token_id": 0}
    model = tiny_model(family, **fields)
    fingerprint = hashlib.sha256(family.encode()).hexdigest()
    identity = ModelIdentity(fingerprint=fingerprint, name="tiny", architecture=family, dtype="float32")
    factors = compress(model, render_prefix(tokenizer, DOCUMENT), CompressionSpec(rank_k=24, rank_v=24))
    return Talker(LoadedModel(model, tokenizer, identity), factors)
