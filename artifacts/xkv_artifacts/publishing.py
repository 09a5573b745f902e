"""Publishing a prefix artifact: room in its namespace, what is promised of it, its blob, its entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.collector import Collector
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import QuotaExceeded
from xkv_artifacts.format import TOKENS, write_prefix
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.limits import UNLIMITED, Quota
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.promises import Promises

if TYPE_CHECKING:
    import torch


class Publisher:
    """Publishes to one store."""

    def __init__(self, blobs: BlobStore, catalog: Catalog, collector: Collector, promises: Promises) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._collector = collector
        self._promises = promises

    def publish(
        self,
        manifest: PrefixManifest,
        tensors: Mapping[str, torch.Tensor],
        quota: Quota,
        pinned: bool,
        ttl_s: float | None,
    ) -> PrefixManifest:
        """See `ArtifactStore.publish`. Room is made twice: before the blob is written, by the tensors' bytes,
        and by its own size where that was not enough.
        """
        if not quota.unlimited:
            least = sum(tensor.nbytes for tensor in tensors.values())
            self._collector.make_room(manifest.namespace, quota, least, manifest.id)
        self._catalog.forget_deletion(manifest.id)
        with self._promises.of_new(manifest.id, pinned, ttl_s):
            written = self._blobs.put(manifest.id, lambda file: write_prefix(file, manifest, tensors))
        self._list(written, token_bytes(tensors[TOKENS].tolist()), quota)
        return written

    def _list(self, manifest: PrefixManifest, tokens: bytes, quota: Quota) -> None:
        """List a blob that was just written; where its namespace has no room for it, it is deleted again."""
        retention, now = self._promises.current(manifest.id)
        size = self._blobs.size(manifest.id)
        entry = Entry.of_manifest(manifest, size=size, last_used=now, retention=retention)
        self._catalog.keep_spec(manifest.spec)
        while not self._catalog.publish(entry, tokens, quota):
            try:
                self._collector.make_room(entry.namespace, quota, size, entry.id)
            except QuotaExceeded:
                if not self._catalog.entries(ids=[entry.id]):
                    self._blobs.remove(entry.id)
                    self._promises.forget(entry.id)
                    raise
                quota = UNLIMITED  # what it replaces was listed, and is gone: better a few bytes too many
