"""`ArtifactStore`: blobs and their catalog as one thing. The blobs are the truth; the catalog finds them."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from xkv_artifacts.blobs import CALIBRATING, not_found, open_blob_store
from xkv_artifacts.calibration_shelf import CalibrationShelf
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.checked_prefixes import CheckedPrefixes
from xkv_artifacts.collector import Collector
from xkv_artifacts.damage_board import DamageBoard, Note
from xkv_artifacts.embedded import EmbeddedRedis, catalog_folder, embedded_redis_url
from xkv_artifacts.embedded_keeper import kept_alive
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    StoreError,
)
from xkv_artifacts.jobs import JobBoard
from xkv_artifacts.keys import check_namespace, is_artifact_id
from xkv_artifacts.limits import Limits, limits_of_store
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.missing_blobs import MissingBlobs
from xkv_artifacts.namespace_index import Usage
from xkv_artifacts.origin import Origin
from xkv_artifacts.packable_blobs import PackableBlobs
from xkv_artifacts.prefix_listing import PrefixListing
from xkv_artifacts.prefix_lookup import OnLost, PrefixLookup
from xkv_artifacts.promises import Change, Promises
from xkv_artifacts.publishing import Publisher
from xkv_artifacts.read_ahead import Landing
from xkv_artifacts.readers import Readers
from xkv_artifacts.redis_link import DEFAULT_PATIENCE_S, RedisLink
from xkv_artifacts.reports import Collection, Match, Orphans, Rebuild, Verification
from xkv_artifacts.retention import Retention, RetentionShelf
from xkv_artifacts.tail_shelf import TailShelf

if TYPE_CHECKING:
    import torch

    from xkv_artifacts.keys import TokenIds

Standing = Literal["pinned", "kept", "gone"]
REDIS_URL_VARIABLE = "XKV_REDIS_URL"
_FEW = 100
"""Blobs that are looked for one by one sooner than all blobs are listed."""
_LISTINGS = 3
"""Times that a store is listed in a row where its catalog is emptied meanwhile (a guess): a server begins
again a minute later."""
SUMS_KEPT_S = 7 * 24 * 3600.0
"""Seconds for which a calibration that was broken off can be gone on with, whatever is cleaned up."""
_log = logging.getLogger(__name__)

__all__ = ["ArtifactStore", "Match", "Orphans", "Rebuild", "Verification"]


class ArtifactStore:
    """A store of prefix artifacts and calibrations with its catalog. Made by `open`; a context manager."""

    def __init__(self, blobs: PackableBlobs, catalog: Catalog, embedded: EmbeddedRedis | None = None) -> None:
        self.blobs = blobs
        self.catalog = catalog
        self.calibrations = CalibrationShelf(blobs, catalog.calibrations)
        self.jobs = JobBoard(catalog.link, catalog.store_id)
        self.damaged = DamageBoard(catalog.link, catalog.store_id)
        self.tails = TailShelf(blobs, catalog.link, catalog.store_id)
        self._embedded = embedded
        self._retention = RetentionShelf(blobs)
        self._missing = MissingBlobs(blobs, catalog, self._retention, self.damaged)
        self._checked = CheckedPrefixes(blobs, self._forget, self._note_damage, self._missing)
        self._lookup = PrefixLookup(blobs, catalog, self._checked)
        self._readers = Readers(catalog)
        self._promises = Promises(blobs, catalog, self._retention)
        self._listing = PrefixListing(blobs, catalog, self._checked, self._retention, self._missing)
        self._collector = Collector(blobs, catalog, self._retention, self._listing.list_blob)
        self._publisher = Publisher(blobs, catalog, self._collector, self._promises)

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
            if embedded is not None:
                store.list_if_lost()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def redis_url(self) -> str:
        """The catalog's Redis URL, for other processes (on this machine only when it is embedded)."""
        return self.catalog.link.url

    def keeping_catalog(self) -> AbstractContextManager[None]:
        """While the block runs, an embedded server that dies is started again at once.

        One process does so for all that share it. A Redis of the user's own is left to the user.
        """
        return kept_alive(self._embedded, self.list_if_lost) if self._embedded else nullcontext()

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

    def publish(
        self,
        manifest: PrefixManifest,
        tensors: Mapping[str, torch.Tensor],
        *,
        pinned: bool = False,
        ttl_s: float | None = None,
    ) -> PrefixManifest:
        """Write an artifact's blob, then list it in the catalog.

        Tensors go by stored name, of the shapes in docs/format.md; the manifest returned has their checksums.
        Whoever might publish or collect the same id at the same time takes its lease first.

        Args:
            pinned, ttl_s: as `pin` and `set_ttl`, from the first moment on. What was promised of this id
                before stays, unless its time is over.

        Raises:
            CorruptArtifact: manifest and tensors do not fit together; nothing is written.
            QuotaExceeded: its namespace has no room for it, and none could be made; nothing is left behind.
            StoreError: the blob could not be written; nothing is left behind.
            CatalogUnavailable: the blob is there, but not listed; the next `get` lists it.
            InvalidLimits: the store's limits cannot be read, or `ttl_s` is none.
        """
        quota = self.limits().quota(manifest.namespace)
        written = self._publisher.publish(manifest, tensors, quota, pinned, ttl_s)
        with suppress(CatalogUnavailable):  # it is listed, and a note does no harm
            self.damaged.take(manifest.id)
        return written

    def check_room(self, namespace: str, size: int, artifact_id: str) -> None:
        """Say before an artifact is made that publishing `size` bytes would be refused; nothing is collected.

        Raises:
            QuotaExceeded: its namespace has no room for it, and none could be made now.
            InvalidLimits, CatalogUnavailable, CatalogError, StoreError
        """
        quota = self.limits().quota(check_namespace(namespace))
        if not quota.unlimited:
            self._collector.check_room(namespace, quota, size, artifact_id)

    def load(
        self, artifact_id: str, names: Iterable[str] | None = None
    ) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
        """Read tensors (all, or `names`; shapes in docs/format.md) to the CPU, every byte of them checked.

        Raises:
            ArtifactNotFound: there is no such blob (any more), or its time is over.
            MissingBlob: its blob is gone, and nobody deleted it; it is not listed any more, and noted.
            CorruptArtifact: the blob is bad; it was moved to quarantine and its entry dropped.
            UnsupportedFormat: another version wrote it.
            MissingTensor: a name is not in the blob.
        """
        with self.reading(artifact_id):
            return self._checked.read_prefix(artifact_id, names)

    def load_parts(
        self, artifact_id: str, parts: Iterable[Iterable[str]], landing: Landing | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> Generator[dict[str, torch.Tensor], None, None]:  # fmt: skip
        """As `load`, the tensors that each part names when they are asked for, in one read of the blob.

        Args:
            landing: where they go to instead of the CPU's memory; the next parts are read while one is used.
            digests: by tensor, `tensors` of the manifest that the caller goes by.

        Raises:
            StoreError: the artifact has been made again, with other bytes, since that manifest was read.
        """
        with self.reading(artifact_id):
            yield from self._checked.read_parts(artifact_id, parts, landing, digests)

    def reading(self, artifact_id: str) -> AbstractContextManager[None]:
        """Keep every collector away from an artifact while the block runs, over several `load`s for example.

        Raises:
            ArtifactNotFound: when the block is entered: its time is over.
        """
        return self._readers.hold(artifact_id)

    def get(self, artifact_id: str) -> Entry | None:
        """The artifact's entry, or None when it is not stored or its time is over. Listing follows the blobs:
        a blob that is not listed is listed now, an entry without a blob is dropped (and noted, where the
        blob is missing; see `lookup`).

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
                self._missing.log(artifact_id)
            return None
        try:
            entry = entry or self._listing.list_blob(artifact_id)
        except (CorruptArtifact, ArtifactNotFound):
            return None
        return next(iter(self._not_ended([entry])), None)

    def entries(self, on_fault: Callable[[CatalogError], None] | None = None) -> list[Entry]:
        """All entries, most recently used first; damaged ones are left out and told to `on_fault`."""
        return self.catalog.entries(on_fault)

    def page(
        self,
        namespace: str,
        cursor: str | None = None,
        limit: int = 100,
        on_fault: Callable[[CatalogError], None] | None = None,
    ) -> tuple[list[Entry], str | None]:
        """Up to `limit` entries of a namespace, most recently used first, and the cursor of the next page, if
        there is one.

        No other namespace's entries are read, and what has ended is left out. An artifact that is used
        between two pages moves to the front, and may be missed.

        Raises:
            InvalidNamespace, InvalidCursor, CatalogUnavailable, CatalogError
        """
        found, following = self.catalog.namespaces.page(check_namespace(namespace), cursor, limit)
        entries = self.catalog.entries(on_fault, [artifact_id for artifact_id, _ in found])
        return self._not_ended([entry for entry in entries if entry.namespace == namespace]), following

    def usage(self, namespace: str) -> Usage:
        """Bytes and number of a namespace's artifacts, and how much of that is pinned, counted now.

        Raises:
            InvalidNamespace, CatalogUnavailable, CatalogError
        """
        return self.catalog.namespaces.recount(check_namespace(namespace))

    def standings(self, ids: Sequence[str]) -> dict[str, Standing]:
        """Which of some artifacts are pinned, and which are gone: they ended, or neither catalog nor blobs
        have them. What the catalog alone has lost is kept. Redis is asked once, in one round trip.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        found: dict[str, Standing] = {}
        for artifact_id, listed in self.catalog.listed(ids).items():
            if listed == "pinned":
                found[artifact_id] = "pinned"
            elif listed == "ended" or (listed == "unlisted" and not self.blobs.exists(artifact_id)):
                found[artifact_id] = "gone"
            else:
                found[artifact_id] = "kept"
        return found

    def manifest(self, artifact_id: str) -> PrefixManifest:
        """An artifact's manifest, from the blob's own header. Raises as `load`."""
        return self._checked.read_manifest(artifact_id)

    def read_in_ranges(self, artifact_id: str) -> bool:
        """Whether some tensors are read sooner than all: not from a packed blob. Raises as `load`."""
        return self._checked.read_in_ranges(artifact_id)

    def lookup(
        self,
        fingerprint: str,
        namespace: str,
        token_ids: TokenIds,
        *,
        whole: bool = False,
        on_lost: OnLost | None = None,
    ) -> Match | None:
        """The artifact that shares the longest prefix with a prompt.

        Exact when the prompt contains the whole artifact; where prompt and artifact part inside a block of
        64 tokens, another might share up to 63 tokens more. The match is always compared token by token.
        Of artifacts that share equally many the one of the highest fidelity is taken, then the largest blob.
        Ids in an int32 or int64 array or tensor are faster: 134k take under 0.1 ms to read, a list 2 ms.

        Args:
            whole: only artifacts that the prompt contains to their last token; exact then.
            on_lost: told of each candidate that was dropped: its blob was found damaged or missing now, or it
                was unlisted during the lookup. Missing is a blob that is gone though its artifact was neither
                deleted nor collected and has not ended.

        Raises:
            InvalidNamespace, InvalidKey, CatalogUnavailable, CatalogError, StoreError
        """
        return self._lookup.find(fingerprint, namespace, token_ids, whole=whole, on_lost=on_lost)

    def lookup_other_models(
        self, fingerprint: str, namespaces: Sequence[str], token_ids: TokenIds
    ) -> Match | None:
        """After `lookup` found nothing in these namespaces: an artifact that other models have in them of the
        same tokens. It serves no prompt of this model, but says why there is none.

        Of up to 8 models of each namespace, those of most artifacts, the one counts that shares most with the
        prompt's first 2,048 tokens, and at least 64. The match is compared token by token, as far as it goes.
        One round trip, and none where this process's last such `lookup` was told of no other model.

        Raises:
            InvalidNamespace, InvalidKey, CatalogUnavailable, CatalogError, StoreError
        """
        return self._lookup.find_of_other_models(fingerprint, namespaces, token_ids)

    def verify(self, ids: Iterable[str] | None = None) -> Iterator[Verification]:
        """Re-read every byte of artifacts and calibrations (all there are, or `ids`); nothing is changed. An
        artifact that shares the bases of a calibration which is gone or damaged is at fault as well.

        Raises:
            CatalogUnavailable, StoreError
        """
        calibrations, bases = self.calibrations.ids(), dict[str, str | None]()
        if ids is None:
            ids = [*sorted({*self.blobs.ids(), *self.catalog.ids()}), *calibrations]
        for artifact_id in ids:
            if artifact_id in calibrations:
                yield Verification(artifact_id, self.calibrations.fault(artifact_id), calibration=True)
            else:
                fault = self._checked.fault(artifact_id) or self._fault_of_bases(artifact_id, bases)
                lost = fault is not None and artifact_id in self.missing([artifact_id])
                yield Verification(artifact_id, self._missing.message(artifact_id) if lost else fault)

    def missing(self, ids: Sequence[str]) -> set[str]:
        """Which of some listed artifacts have no blob. Those few are looked for one by one, after all blobs
        were listed where there are many; nothing is changed.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        stored = set(self.blobs.ids()) if len(ids) > _FEW else set()
        named = [name for name in ids if is_artifact_id(name)]
        gone = [name for name in named if name not in stored and not self.blobs.exists(name)]
        listed = self.catalog.listed(gone) if gone else {}  # else it was deleted meanwhile
        return {name for name in gone if listed[name] in ("listed", "pinned")}

    def remove(self, artifact_id: str) -> bool:
        """Delete an artifact, its entry first; False when there was none.

        Raises:
            CatalogUnavailable, StoreError
        """
        listed = self.catalog.delete(artifact_id)
        self.damaged.take(artifact_id)
        stored = self.blobs.remove(artifact_id)
        return self._retention.remove(artifact_id) or stored or listed

    def pin(self, artifact_id: str) -> Retention:
        """Keep an artifact whatever its time to live, and however full the store is, until `remove`.

        Raises:
            ArtifactNotFound: it is not stored, or its time is over.
            CatalogUnavailable, CatalogError, StoreError: it may be as it was, or changed; do it again.
        """
        return self._retain(artifact_id, lambda old, _: old.model_copy(update={"pinned": True}))

    def unpin(self, artifact_id: str) -> Retention:
        """Let collectors have an artifact: at once, where its time is over. Raises as `pin`."""
        return self._retain(artifact_id, lambda old, _: old.model_copy(update={"pinned": False}))

    def set_ttl(self, artifact_id: str, ttl_s: float | None) -> Retention:
        """Let an artifact end so many seconds from now, however often it is used; None: never.

        Raises:
            InvalidLimits: not more than 0 s, or more than 100 years.
            ArtifactNotFound, CatalogUnavailable, CatalogError, StoreError: as `pin`.
        """
        return self._retain(artifact_id, lambda old, now: old.with_ttl(ttl_s, now))

    def promised(self, artifact_id: str) -> tuple[Retention, float]:
        """What is promised of an artifact, stored or lost, and the second since the epoch that it is now.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        return self._retention.get(artifact_id), self.catalog.now()

    def end_promise(self, artifact_id: str) -> None:
        """Promise nothing any more of an artifact that is lost; of one that is stored all stays as it is.

        Raises:
            StoreError
        """
        if not self.blobs.exists(artifact_id):
            self._promises.forget(artifact_id)

    def limits(self) -> Limits:
        """What the store and its namespaces may hold: its own file `limits.json`, read now.

        Raises:
            InvalidLimits, StoreError
        """
        return limits_of_store(self.blobs)

    def collect(
        self, limits: Limits | None = None, *, dry_run: bool = False, only_if_enough: bool = False
    ) -> Collection:
        """Delete what has ended, then what is beyond the limits: of each namespace, then of the whole store,
        what is longest unused. Nothing that is pinned, read or computed now is deleted. Stored tails of
        conversations go when their time is over; their server keeps them within a budget of its own.

        Any number of processes may do so at once. Killed in between, it leaves at most a blob without an
        entry, which `collect_orphans` lists again.

        Args:
            limits: by default the store's own.
            dry_run: only say what would be deleted.
            only_if_enough: delete nothing for a budget that pinned artifacts and calibrations exceed by
                themselves. Else all that may go does, and the store comes as near to it as it can.

        Raises:
            InvalidLimits, CatalogUnavailable, CatalogError, StoreError
        """
        limits = self.limits() if limits is None else limits
        result = self._collector.collect(limits, dry_run=dry_run, only_if_enough=only_if_enough)
        return replace(result, tails=self.tails.collect(dry_run=dry_run))

    def pack(self, artifact_id: str, *, undo: bool = False) -> bool:
        """Code an artifact's blob without loss for cold storage, or undo that; False where nothing changed.

        Its entry then says what is stored. Readers notice nothing but the time.

        Raises:
            CorruptArtifact: the blob is bad; it was moved to quarantine and its entry dropped.
            ArtifactNotFound, StoreError, CatalogUnavailable
        """
        _, tokens = self._checked.read_tokens(artifact_id)
        if not (self.blobs.unpack(artifact_id) if undo else self.blobs.pack(artifact_id)):
            return False
        entry = self.get(artifact_id)
        if entry is not None:
            size = self.blobs.size(artifact_id)
            now = {"bytes": size, "ratio": entry.bytes_full / size}
            self.catalog.publish(entry.model_copy(update=now), tokens)
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

    def list_if_lost(self) -> Rebuild | None:
        """List what the store holds in a catalog that lost it, or some of it, or never knew: that of a Redis
        that came back empty. What works meanwhile goes on.

        Returns:
            None: the catalog is complete, or somebody else is at it (who starts an embedded one does it too).

        Raises:
            CatalogUnavailable, StoreError
        """
        embedded = self._embedded
        if self.catalog.is_built() and not (embedded and embedded.damaged):
            return None
        lease = self.catalog.lease("listing", uuid.uuid4().hex)
        if lease is None and embedded is None:
            return None
        with lease or nullcontext():
            listed = self._list_all()
        if embedded is not None and embedded.damaged:
            _log.warning("the embedded catalog was damaged: it is made again from %s", self.blobs.url)
            embedded.damaged = False
        for bad in listed.faults:
            _log.warning("artifact %s is left out of the catalog: %s", bad.artifact_id, bad.fault)
        return listed

    def collect_orphans(self) -> Orphans:
        """Remove what killed processes left behind; no artifact is deleted. Sums of a calibration that was
        broken off go when nobody has gone on with it for `SUMS_KEPT_S`, and stored tails that the catalog
        does not list.

        Raises:
            CatalogUnavailable, StoreError
        """
        files, size = self.blobs.remove_temporary()
        dropped, found = self._listing.list_orphans()
        more_dropped, more_found = self.calibrations.list_orphans()
        self._promises.sweep()
        sums, tails = self._remove_old_sums(), self.tails.sweep()
        return Orphans(files, size, dropped + more_dropped, found + more_found, sums, tails)

    def _remove_old_sums(self) -> int:
        sums, removed = self.blobs.of(CALIBRATING), 0
        for key in list(sums.ids()):
            with suppress(ArtifactNotFound):
                if sums.age(key) > SUMS_KEPT_S and self.catalog.lease_owner(key) is None:
                    removed += sums.remove(key)
        return removed

    def _fault_of_bases(self, artifact_id: str, known: dict[str, str | None]) -> str | None:
        """What is wrong with the calibration whose bases a sound artifact shares; `known` keeps it."""
        manifest = self._checked.read_manifest(artifact_id)
        needed = str(manifest.spec.get("calibration"))
        if manifest.spec.get("basis") != "calibrated":
            return None
        if needed not in known:
            present = is_artifact_id(needed) and self.calibrations.blobs.exists(needed)
            known[needed] = self.calibrations.fault(needed) if present else "it is not in the store"
        fault = known[needed]
        return fault and f"it cannot be decoded without calibration {needed[:12]}: {fault}"

    def list_returned(self) -> int:
        """List artifacts whose blobs were missing and are there again; how many.

        Raises:
            CatalogUnavailable, StoreError
        """
        noted = [artifact_id for artifact_id, note in self.damaged.all().items() if note.missing]
        return sum(
            self.get(artifact_id) is not None and self.damaged.take(artifact_id) for artifact_id in noted
        )

    def _list_all(self) -> Rebuild:
        """Again where Redis comes back empty meanwhile; in the end the catalog may still not be built."""
        for _ in range(_LISTINGS):
            listing = self.catalog.begin_listing()
            artifacts, faults = self._listing.list_all()
            calibrations, more_faults = self.calibrations.list_all()
            if self.catalog.set_built(listing):
                break
            _log.warning("the catalog was emptied while the store was listed")
        return Rebuild(artifacts, (*faults, *more_faults), calibrations)

    def _not_ended(self, entries: list[Entry]) -> list[Entry]:
        if not any(entry.expires is not None for entry in entries):
            return entries
        now = self.catalog.now()
        return [
            entry for entry in entries if not Retention(pinned=entry.pinned, expires=entry.expires).over(now)
        ]

    def _retain(self, artifact_id: str, change: Change) -> Retention:
        if self.get(artifact_id) is None:
            raise not_found(artifact_id, self.blobs)
        return self._promises.change(artifact_id, change)

    def _forget(self, artifact_id: str) -> None:
        """Drop the entry of a blob that is gone; tried once, a reader waits, and `lookup` would notice."""
        with suppress(CatalogUnavailable, CatalogError):
            self.catalog.drop(artifact_id, patience_s=0)

    def _note_damage(self, artifact_id: str, manifest: PrefixManifest | None) -> None:
        """Whoever has its tokens can make it again; one whose time is over is not missed."""
        with suppress(CatalogUnavailable, CatalogError, StoreError):
            retention, now = self.promised(artifact_id)
            if not retention.over(now):
                origin = None if manifest is None else Origin.of_manifest(manifest)
                self.damaged.note(artifact_id, Note(origin))
