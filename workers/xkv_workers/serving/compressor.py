"""`Compressor`: makes prefixes for a server, and keeps its store within limits. A Ray Serve deployment."""

from __future__ import annotations

import itertools
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass

from xkv_artifacts.errors import XKVError
from xkv_service.api.backend import NewPrefix, PrefixRecord
from xkv_service.api.prefix_records import PrefixRecords
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.place import open_place
from xkv_workers.serving.logs import join_serve
from xkv_workers.serving.process_end import end_process
from xkv_workers.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
COLLECT_S = 60.0
"""Between two looks at what has ended, or was lost: a time to live is kept to within a minute."""
SWEEP_EVERY = 60
"""Looks between two of all stored tails for those that the catalog lost: once an hour."""


@dataclass(frozen=True)
class Refused:
    """An error that somebody else is to raise: Ray would wrap it in one of its own."""

    error: XKVError


class Compressor:
    """One replica: prefixes are made one after the other."""

    def __init__(self, settings: ServeSettings) -> None:
        join_serve()
        loaded, self._store = open_place(settings.place)
        # Only a replica needs these, not the process that deploys it.
        from xkv_service.api.prefix_maker import PrefixMaker
        from xkv_workers.calibration_choice import choose_calibration

        calibration = choose_calibration(self._store, loaded.identity, CompressionOptions())
        self._records = PrefixRecords(self._store)
        self._maker = PrefixMaker(
            self._store, loaded, calibration=calibration, ratio=settings.ratio, on_death=end_process
        )
        self._ending = threading.Event()
        threading.Thread(target=self._collect, name="collector", daemon=True).start()

    async def create(self, new: NewPrefix) -> PrefixRecord | Refused:
        """As `PrefixService`, or `Refused`."""
        try:
            return await self._maker.create(new)
        except XKVError as error:
            return Refused(error)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it did not come up
            self._ending.set()
            self._maker.close()
            self._store.close()

    def _list_lost(self) -> None:
        try:
            listed = self._store.list_if_lost()
        except XKVError as error:
            _log.warning("the store could not be listed: %s", error.message)
        else:
            if listed is not None:
                _log.warning("the catalog did not know this store: %d prefixes are listed", listed.artifacts)

    def _collect(self) -> None:
        self._list_lost()  # a Redis that never knew this store would have no prefix to offer for a minute
        for number in itertools.count(1):
            if self._ending.wait(COLLECT_S):
                return
            self._list_lost()
            try:
                returned = self._store.list_returned()
                self._records.remove_left()
                found = self._store.collect()
                if number % SWEEP_EVERY == 0:
                    self._store.tails.sweep()
            except XKVError as error:
                _log.warning("nothing was collected: %s", error.message)
            else:
                if returned:
                    _log.warning("%d prefixes whose files were missing are there again", returned)
                if found.removed:
                    _log.info("%d prefixes were deleted", len(found.removed))
                if found.tails.tails:
                    _log.info("%d stored tails were deleted", found.tails.tails)
