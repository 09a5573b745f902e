"""`TailShelf`: tails of conversations, kept in a store for a while. Losing one costs time, nothing else.

A tail's blob is a session file under an id that hashes its tokens, its namespace and what stands before it.
The namespace is not in the file, so nobody can list a blob again that the catalog has lost: it is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xkv_artifacts.blobs import TAIL_SUFFIX, TAILS, BlobStore
from xkv_artifacts.checked_blobs import CheckedBlobs
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    ForeignTail,
    QuotaExceeded,
)
from xkv_artifacts.format import TOKENS
from xkv_artifacts.keys import is_artifact_id, tail_id, token_bytes
from xkv_artifacts.readers import Readers
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.reports import TailUsage
from xkv_artifacts.session_format import SessionManifest, lay_out_session, read_session
from xkv_artifacts.tail_entry import TailEntry, TailMatch
from xkv_artifacts.tail_index import TailIndex

if TYPE_CHECKING:
    import torch

UNLISTED_S: Final = 600.0
"""A blob that is not listed may be one that its writer is about to list, for so many seconds."""

_Read = tuple[SessionManifest, "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class PutTail:
    """What storing a tail came to: its bytes, 0 where it was there, and the bytes of all tails, if known."""

    bytes: int
    total: int | None = None


class TailShelf:
    """The stored tails of one store.

    Args:
        blobs: the store's blobs, of whatever folder.
        link: connection to the catalog's Redis. store_id: names the store there.
    """

    def __init__(self, blobs: BlobStore, link: RedisLink, store_id: str) -> None:
        self.blobs = blobs.of(TAILS, TAIL_SUFFIX)
        self.index = TailIndex(link, store_id)
        self._readers = Readers(self.index)
        self._checked = CheckedBlobs(self.blobs, self._forget, noun="stored tail", delete=True)

    def put(
        self,
        manifest: SessionManifest,
        tensors: Mapping[str, torch.Tensor],
        namespace: str,
        *,
        ttl_s: float,
        budget: int,
    ) -> PutTail:
        """Write a tail, then list it, and delete others until the budget is kept (see `TailIndex.publish`).

        Stored tails of the same conversation that it continues are deleted too.

        Args:
            manifest, tensors: as of a session file.
            ttl_s: seconds until it ends, however often it is used. budget: bytes of all tails of the store.

        Raises:
            CorruptArtifact: manifest and tensors do not fit together; nothing is written.
            QuotaExceeded: it is larger than the budget, or than what others leave its namespace; nothing is
                kept of it, and none has to go for it.
            CatalogUnavailable, CatalogError, StoreError: it is not stored.
        """
        tokens = token_bytes(tensors[TOKENS])
        name = _name(manifest, namespace, tokens)
        if self.index.touch(name) and self.blobs.exists(name):
            return PutTail(0)
        older = self._continued(manifest, namespace, tokens)
        ready = lay_out_session(manifest, tensors)
        size = len(ready.head) + sum(len(view) for view in ready.views.values())
        if size > budget:
            raise QuotaExceeded(
                f"a tail of {size} bytes is larger than the budget for stored tails, {budget}"
            )
        self.blobs.put(name, ready.write)
        entry = TailEntry(
            id=name,
            bytes=size,
            fingerprint=manifest.model.fingerprint,
            namespace=namespace,
            artifact=manifest.artifact,
            tokens=manifest.tokens,
            prefix_tokens=manifest.prefix_tokens,
            last_used=0.0,
        )
        try:
            total, dropped = self.index.publish(entry, tokens, ttl_s, budget)
        except (CatalogUnavailable, CatalogError):
            self.blobs.remove(name)
            raise
        if name in dropped:
            self.blobs.remove(name, durably=False)
            raise QuotaExceeded(
                f"a tail of {size} bytes is more than the share of namespace {namespace!r} of the budget for "
                f"stored tails, {budget}"
            )
        for gone in [*dropped, *(old for old in older if self.index.drop(old, "unused"))]:
            self.blobs.remove(gone, durably=False)
        return PutTail(entry.bytes, total)

    def find(self, fingerprint: str, namespace: str, tokens: bytes) -> list[TailMatch]:
        """Of the model's and namespace's tails those that share most with a prompt, best first.

        Raises:
            CatalogUnavailable, CatalogError
        """
        return self.index.find(fingerprint, namespace, tokens)

    def load(self, name: str, fingerprint: str, namespace: str, most_bytes: int) -> _Read:
        """Read a tail, every byte checked. No collector deletes it meanwhile.

        Args:
            most_bytes: a larger blob is not read.

        Raises:
            ArtifactNotFound: it is not listed or not there (any more).
            ForeignTail: it is of another model or namespace than these, or larger.
            CorruptArtifact: the blob is bad; it was deleted.
            UnsupportedFormat, StoreError
        """
        with self._readers.hold(name):
            try:
                if self.blobs.size(name) > most_bytes:
                    raise ForeignTail(f"stored tail {name[:12]} is larger than {most_bytes} bytes")
                manifest, tensors = self._checked.read(name, read_session)
            except ForeignTail:
                raise
            except ArtifactNotFound:
                self._forget(name)
                raise
        found = _name(manifest, namespace, token_bytes(tensors[TOKENS]))
        if (found, manifest.model.fingerprint) != (name, fingerprint):
            raise ForeignTail(f"stored tail {name[:12]} is not of this model and namespace")
        return manifest, tensors

    def collect(self, *, dry_run: bool = False) -> TailUsage:
        """Delete the tails whose time is over and that nobody reads.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        removed = size = start = 0
        while page := self.index.expired(start):
            gone = 0
            for name, entry in page.items():
                if not dry_run and not self.index.drop(name, "ended"):
                    continue
                gone += 1
                held = entry.bytes if entry is not None else self._blob_bytes(name)
                removed += held > 0
                size += held
                if held and not dry_run:
                    self.blobs.remove(name, durably=False)
            start += len(page) if dry_run else len(page) - gone
        return TailUsage(removed, size)

    def usage(self) -> TailUsage:
        """What there is, whatever the catalog says of it.

        Raises:
            StoreError
        """
        sizes = list(self.blobs.sizes())
        return TailUsage(len(sizes), sum(sizes))

    def sweep(self) -> int:
        """Delete blobs that nobody lists (any more) and drop entries without a blob: how many blobs.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        stored = set(self.blobs.ids())
        self.index.drop_damaged()
        listed = set(self.index.ids())  # after the blobs: what is listed meanwhile is among these
        for name in filter(is_artifact_id, listed - stored):
            if not self.blobs.exists(name):
                self.index.drop(name, "gone")
        removed = 0
        for name in stored - listed:
            with suppress(ArtifactNotFound):
                if self.blobs.age(name) > UNLISTED_S:
                    removed += self.blobs.remove(name, durably=False)
        self.index.recount()
        return removed

    def _blob_bytes(self, name: str) -> int:
        """Of a tail of which the catalog knows no more than a name, if that."""
        with suppress(ArtifactNotFound):
            return self.blobs.size(name) if is_artifact_id(name) else 0
        return 0

    def _continued(self, manifest: SessionManifest, namespace: str, tokens: bytes) -> list[str]:
        """Stored tails that end inside of this one, behind the same prefix."""
        own = manifest.artifact, manifest.prefix_tokens
        return [
            match.id
            for match in self.find(manifest.model.fingerprint, namespace, tokens)
            if match.whole
            and match.entry.tokens < manifest.tokens
            and (match.entry.artifact, match.entry.prefix_tokens) == own
        ]

    def _forget(self, name: str) -> None:
        with suppress(CatalogUnavailable, CatalogError):
            self.index.drop(name, "gone")


def _name(manifest: SessionManifest, namespace: str, tokens: bytes) -> str:
    prefix = {
        "artifact": manifest.artifact,
        "tokens": manifest.prefix_tokens,
        "selection": manifest.selection,
    }
    return tail_id(manifest.model.fingerprint, namespace, tokens, prefix)
