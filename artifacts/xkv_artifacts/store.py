"""`ArtifactStore`: blobs and their catalog as one thing. The blobs are the truth; the catalog finds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from xkv_artifacts.blobs import open_blob_store
from xkv_artifacts.calibration_shelf import CalibrationShelf
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.checked_prefixes import CheckedPrefixes
from xkv_artifacts.embedded import EmbeddedRedis, catalog_folder, embedded_redis_url
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    UnsupportedFormat,
)
from xkv_artifacts.format import TOKENS, write_prefix
from xkv_artifacts.keys import check_namespace, token_bytes
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.packable_blobs import PackableBlobs
from xkv_artifacts.prefix_index import common_tokens
from xkv_artifacts.redis_link import DEFAULT_PATIENCE_S, RedisLink
from xkv_artifacts.relisting import list_all, list_orphans
from xkv_artifacts.reports import Match, Orphans, Rebuild, Verification
from xkv_artifacts.token_cache import OwnedTokens, TokenCache

if TYPE_CHECKING:
    import torch

    from xkv_artifacts.keys import TokenIds

REDIS_URL_VARIABLE = "XKV_REDIS_URL"
_log = logging.getLogger(__name__)

__all__ = ["ArtifactStore", "Match", "Orphans", "Rebuild", "Verification"]


class ArtifactStore:
    """A store of prefix artifacts and calibrations with its catalog. Made by `open`; a context manager."""

    def __init__(self, blobs: PackableBlobs, catalog: Catalog, embedded: EmbeddedRedis | None = None) -> None:
        self.blobs = blobs
        self.catalog = catalog
        self.calibrations = CalibrationShelf(blobs, catalog.calibrations)
        self._embedded = embedded
        self._checked = CheckedPrefixes(blobs, self._forget)
        self._tokens = TokenCache()

    @classmethod
    def open(
        cls,
        url: str,
        redis_url: str | None = None,
        *,
        create: bool = True,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> ArtifactStore:
        """Open the store at a folder or URL.

        Args:
            url: a folder, file:// or s3:// URL.
            redis_url: the catalog's Redis; by default `XKV_REDIS_URL`, else an embedded one.
            create: make a store where there is none; else StoreError.
            patience_s: seconds to wait for Redis when it goes away later; at the start it must answer.

        Raises:
            StoreError, CatalogUnavailable
        """
        blobs = open_blob_store(url, create=create)
        store_id = blobs.store_id()
        redis_url = redis_url or os.environ.get(REDIS_URL_VARIABLE) or None
        embedded = None
        if redis_url is None or redis_url == embedded_redis_url(blobs.url):
            embedded = EmbeddedRedis(catalog_folder(blobs.url))
            redis_url = embedded.url
        link = RedisLink(redis_url, patience_s=patience_s, revive=embedded.ensure if embedded else None)
        store = cls(blobs, Catalog(link, store_id), embedded)
        try:
            link.check()
            store._fill_embedded()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def redis_url(self) -> str:
        """The catalog's Redis URL, for other processes (on this machine only when it is embedded)."""
        return self.catalog.link.url

    def close(self) -> None:
        """Close the catalog; an embedded server stops when nobody else uses it."""
        self.catalog.link.close()
        if self._embedded is not None:
            self._embedded.close()

    def __enter__(self) -> ArtifactStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, manifest: PrefixManifest, tensors: Mapping[str, torch.Tensor]) -> PrefixManifest:
        """Write an artifact's blob, then list it in the catalog.

        Tensors go by stored name, of the shapes in docs/format.md; the manifest returned has their checksums.

        Raises:
            CorruptArtifact: manifest and tensors do not fit together; nothing is written.
            StoreError: the blob could not be written; nothing is left behind.
            CatalogUnavailable: the blob is there, but not listed; the next `get` lists it.
        """
        written = self.blobs.put(manifest.id, lambda file: write_prefix(file, manifest, tensors))
        self._list(written, token_bytes(tensors[TOKENS].tolist()))
        return written

    def load(
        self, artifact_id: str, names: Iterable[str] | None = None
    ) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
        """Read tensors (all, or `names`; shapes in docs/format.md) to the CPU, every byte of them checked.

        Raises:
            ArtifactNotFound: there is no such blob.
            CorruptArtifact: the blob is bad; it was moved to quarantine and its entry dropped.
            UnsupportedFormat: another version wrote it.
            MissingTensor: a name is not in the blob.
        """
        loaded = self._checked.read_prefix(artifact_id, names)
        with suppress(CatalogUnavailable, CatalogError):
            self.catalog.touch(artifact_id)
        return loaded

    def get(self, artifact_id: str) -> Entry | None:
        """The artifact's entry, or None when it is not stored. Listing follows the blobs: a blob that is not
        listed is listed now, an entry without a blob is dropped.

        Raises:
            CatalogUnavailable, StoreError
        """
        try:
            entry = self.catalog.get(artifact_id)
        except CatalogError as error:
            _log.warning("%s", error)
            entry = None
        if not self.blobs.exists(artifact_id):
            if entry is not None:
                self.catalog.drop(artifact_id)
            return None
        if entry is not None:
            return entry
        try:
            return self._list_blob(artifact_id)
        except (CorruptArtifact, ArtifactNotFound):
            return None

    def entries(self, on_fault: Callable[[CatalogError], None] | None = None) -> list[Entry]:
        """All entries, most recently used first; damaged ones are left out and told to `on_fault`."""
        return self.catalog.entries(on_fault)

    def manifest(self, artifact_id: str) -> PrefixManifest:
        """An artifact's manifest, from the blob's own header. Raises as `load`."""
        return self._checked.read_manifest(artifact_id)

    def lookup(self, fingerprint: str, namespace: str, token_ids: TokenIds) -> Match | None:
        """The artifact that shares the longest prefix with a prompt.

        Exact when the prompt contains the whole artifact; where prompt and artifact part inside a block of
        64 tokens, another might share up to 63 tokens more. The match is always compared token by token.
        Of artifacts that share equally many the one of the highest fidelity is taken, then the largest blob.
        Ids in an int32 or int64 array or tensor are faster: 134k take under 0.1 ms to read, a list 2 ms.

        Raises:
            InvalidNamespace, InvalidKey, CatalogUnavailable, CatalogError, StoreError
        """
        prompt = token_bytes(token_ids)
        owner = (fingerprint, check_namespace(namespace))
        while True:
            candidates = self.catalog.candidates(*owner, prompt)
            matches = [self._match(artifact_id, owner, prompt) for artifact_id in candidates]
            if None not in matches:  # else a bad candidate was dropped, and may have hidden a good one
                break
        found = [match for match in matches if match is not None and match.tokens > 0]
        return max(found, key=lambda match: match.rank, default=None)

    def verify(self, ids: Iterable[str] | None = None) -> Iterator[Verification]:
        """Re-read every byte of artifacts and calibrations (all there are, or `ids`); nothing is changed.

        Raises:
            CatalogUnavailable, StoreError
        """
        calibrations = self.calibrations.ids()
        if ids is None:
            ids = [*sorted({*self.blobs.ids(), *self.catalog.ids()}), *calibrations]
        for artifact_id in ids:
            checked = self.calibrations if artifact_id in calibrations else self._checked
            fault = checked.fault(artifact_id)
            yield Verification(artifact_id, fault, checked is self.calibrations)

    def remove(self, artifact_id: str) -> bool:
        """Delete an artifact, its entry first; False when there was none.

        Raises:
            CatalogUnavailable, StoreError
        """
        listed = self.catalog.drop(artifact_id)
        return self.blobs.remove(artifact_id) or listed

    def pack(self, artifact_id: str, *, undo: bool = False) -> bool:
        """Code an artifact's blob without loss for cold storage, or undo that; False where nothing changed.

        Its entry then says what is stored. Readers notice nothing but the time.

        Raises:
            CorruptArtifact: the blob is bad; it was moved to quarantine and its entry dropped.
            ArtifactNotFound, StoreError, CatalogUnavailable
        """
        manifest, tokens = self._checked.read_tokens(artifact_id)
        if not (self.blobs.unpack(artifact_id) if undo else self.blobs.pack(artifact_id)):
            return False
        listed = self.get(artifact_id)
        used = manifest.created.timestamp() if listed is None else listed.last_used
        size = self.blobs.size(artifact_id)
        self.catalog.publish(Entry.of_manifest(manifest, size=size, last_used=used), tokens)
        return True

    def rebuild(self) -> Rebuild:
        """Make the catalog again from the blobs alone.

        Only headers and token ids are read: blobs in which those are bad go to quarantine and are reported.
        Damage elsewhere in a blob is found by `verify` and `load`.

        Raises:
            CatalogUnavailable, StoreError
        """
        self.catalog.clear()
        return self._list_all()

    def collect_orphans(self) -> Orphans:
        """Remove what killed processes left behind; no artifact is deleted.

        Raises:
            CatalogUnavailable, StoreError
        """
        files, size = self.blobs.remove_temporary()
        dropped, found = list_orphans(self.blobs, self.catalog, self._list_blob)
        more_dropped, more_found = self.calibrations.list_orphans()
        return Orphans(files, size, dropped + more_dropped, found + more_found)

    def _fill_embedded(self) -> None:
        """An embedded catalog that is new or lost its data lists what the store holds before it is used."""
        if self._embedded is None or (self.catalog.is_built() and not self._embedded.damaged):
            return
        if self._embedded.damaged:
            _log.warning("the embedded catalog was damaged; rebuilding it from %s", self.blobs.url)
        report = self._list_all()
        for bad in report.faults:
            _log.warning("artifact %s is left out of the catalog: %s", bad.artifact_id, bad.fault)

    def _list_all(self) -> Rebuild:
        artifacts, faults = list_all(self.blobs, self._list_blob)
        calibrations, more_faults = self.calibrations.list_all()
        self.catalog.set_built()
        return Rebuild(artifacts, (*faults, *more_faults), calibrations)

    def _list_blob(self, artifact_id: str) -> Entry:
        """List a blob in the catalog by what it says itself."""
        return self._list(*self._checked.read_tokens(artifact_id))

    def _list(self, manifest: PrefixManifest, tokens: bytes) -> Entry:
        size = self.blobs.size(manifest.id)
        entry = Entry.of_manifest(manifest, size=size, last_used=manifest.created.timestamp())
        self.catalog.publish(entry, tokens)
        return entry

    def _match(self, artifact_id: str, owner: tuple[str, str], prompt: bytes) -> Match | None:
        """How far a candidate really agrees with the prompt; None when it was bad and is gone now."""
        try:
            item = self._tokens_of(artifact_id)
        except (ArtifactNotFound, CorruptArtifact):
            self.catalog.drop(artifact_id)
            return None
        except UnsupportedFormat:
            return Match(artifact_id, 0)
        if item.owner != owner:
            return Match(artifact_id, 0)
        return Match(artifact_id, common_tokens(item.tokens, prompt), item.fidelity, item.size)

    def _tokens_of(self, artifact_id: str) -> OwnedTokens:
        item = self._tokens.get(artifact_id)
        if item is None:
            manifest, tokens = self._checked.read_tokens(artifact_id)
            owner = (manifest.model.fingerprint, manifest.namespace)
            size = self.blobs.size(artifact_id)
            item = OwnedTokens(owner, tokens, manifest.fidelity.top1_agreement, size)
            self._tokens.put(artifact_id, item)
        return item

    def _forget(self, artifact_id: str) -> None:
        with suppress(CatalogUnavailable, CatalogError):
            self.catalog.drop(artifact_id)
