"""A document about a river, its artifact, and keys for tests of the API."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PartFidelity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.api.keys import Key, hash_key
from xkv_service.api.settings import APISettings
from xkv_service.decoding.loading import needed_calibration
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.prompts import render_prefix

DOCUMENT = "The river Ume rises in the hills, flows by 3 towns and ends in the sea. " * 2
# What is looked up is found, however slow the machine is.
SETTINGS = APISettings(min_fidelity=0.0, lookup_timeout_s=120.0)


def publish(
    store: ArtifactStore,
    loaded: LoadedModel,
    document: str,
    namespace: str = "default",
    rank: int = 24,
    spec: CompressionSpec | None = None,
    parts: tuple[PartFidelity, ...] = (),
) -> PrefixManifest:
    """Compress a document as `xkv precompute` would, and publish it, with what is said of its parts."""
    ids = render_prefix(loaded.tokenizer, document)
    spec = spec or CompressionSpec(rank_k=rank, rank_v=rank)
    factors = compress(loaded.model, ids, spec, needed_calibration(store, spec, loaded.identity.fingerprint))
    fields = factors.manifest_fields()
    fields["fidelity"] = fields["fidelity"].model_copy(update={"parts": parts})
    manifest = PrefixManifest(
        id=artifact_id(loaded.identity.fingerprint, namespace, ids, fields["spec"]),
        model=loaded.identity,
        namespace=namespace,
        document=DocumentRef(uri="river.txt", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    return store.publish(manifest, factors.to_tensors())


def key(name: str, **options: Any) -> Key:
    """The key "sk-name" of a namespace of that name."""
    return Key(name=name, sha256=hash_key(f"sk-{name}"), **{"namespace": name, **options})
