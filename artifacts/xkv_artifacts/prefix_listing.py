"""Listing prefix blobs in the catalog by what their headers and retention files say."""

from __future__ import annotations

from collections.abc import Container

from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.checked_prefixes import CheckedPrefixes
from xkv_artifacts.entry import Entry
from xkv_artifacts.missing_blobs import MissingBlobs
from xkv_artifacts.relisting import list_all, list_orphans
from xkv_artifacts.reports import Verification
from xkv_artifacts.retention import NO_PROMISE, RetentionShelf


class PrefixListing:
    """Lists the prefix blobs of one store. What cannot be read raises as `CheckedPrefixes`."""

    def __init__(
        self,
        blobs: BlobStore,
        catalog: Catalog,
        checked: CheckedPrefixes,
        retention: RetentionShelf,
        missing: MissingBlobs,
    ) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._checked = checked
        self._retention = retention
        self._missing = missing

    def list_blob(self, artifact_id: str, promised: Container[str] | None = None) -> Entry:
        """List a blob.

        Args:
            promised: the artifacts that have a retention file, where that is known.
        """
        manifest, tokens = self._checked.read_tokens(artifact_id)
        known = promised is None or artifact_id in promised
        retention = self._retention.get(artifact_id) if known else NO_PROMISE
        size, used = self._blobs.size(artifact_id), manifest.created.timestamp()
        entry = Entry.of_manifest(manifest, size=size, last_used=used, retention=retention)
        self._catalog.keep_spec(manifest.spec)
        self._catalog.publish(entry, tokens)
        return entry

    def list_all(self) -> tuple[int, tuple[Verification, ...]]:
        """List every blob: how many could be, and what is wrong with the others."""
        promised = set(self._retention.ids())
        return list_all(self._blobs, lambda artifact_id: self.list_blob(artifact_id, promised))

    def list_orphans(self) -> tuple[int, int]:
        """Drop entries without a blob and list blobs without an entry: how many of each. Sums are counted."""
        found = list_orphans(self._blobs, self._catalog, self.list_blob, self._missing.log)
        self._catalog.namespaces.recount_all()
        return found
