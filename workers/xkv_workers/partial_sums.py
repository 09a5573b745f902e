"""What was observed so far, kept in the store: a calibration that is broken off goes on from there."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

from xkv_artifacts.blobs import CALIBRATING
from xkv_artifacts.checked_file import lay_out, open_header, parse_manifest, read_tensors
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, UnsupportedFormat
from xkv_artifacts.keys import calibration_id, sample_sha256
from xkv_artifacts.manifest import Sha256
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.folds import fold_count
from xkv_service.calibration.observed import Observed
from xkv_service.calibration.observed_tensors import check_observed, observed_of, observed_tensors
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.modeling.layout import ModelLayout

FORMAT: Final = "xkv-calibration-sums"
VERSION: Final = 2
_PAUSE = 10
"""Seconds between two writes for each second that a write takes."""

Tensors = dict[str, torch.Tensor]


class _SumsManifest(BaseModel):
    """Which documents of the sample are in the sums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["xkv-calibration-sums"] = FORMAT
    version: Literal[2] = VERSION
    done: tuple[int, ...]
    tensors: dict[str, Sha256] = {}


class PartialSums:
    """Sums over the documents of a sample in a few parts (`folds.fold_count`), by their positions.

    The file's name is a hash over model, documents, probes and settings: nothing else is ever gone on with.
    One that is damaged, or holds what no run wrote, is begun again.

    Args:
        used: documents that are summed. held: those that are not.
    """

    def __init__(
        self,
        store: ArtifactStore,
        fingerprint: str,
        layout: ModelLayout,
        used: Sequence[ProbedPrefix],
        held: Sequence[ProbedPrefix],
        settings: CalibrationSettings,
    ) -> None:
        self._store, self._blobs = store, store.blobs.of(CALIBRATING)
        self._layout, self._settings, self._documents = layout, settings, len(used)
        sample = [*used, *held]
        self._key = calibration_id(
            fingerprint,
            sample_sha256([one.token_ids for one in sample]),
            asdict(settings),
            {"probes": _probes_sha256(sample)},
        )
        self._write_at = 0.0
        self.done: set[int] = set()
        self._parts: list[Tensors] = [{} for _ in range(fold_count(layout, settings))]
        with suppress(ArtifactNotFound, CorruptArtifact, UnsupportedFormat):
            self._read()

    @property
    def parts(self) -> list[Tensors]:
        """Those that hold a document or more, as `observed_tensors` names their sums."""
        return [part for part in self._parts if part]

    def add(self, position: int, tensors: Tensors) -> None:
        """Add what was observed of one document (`observed_tensors`), and write it down.

        Raises:
            StoreError
        """
        part = self._parts[position % len(self._parts)]
        if part:
            total = self._observed(part)
            total.add(self._observed(tensors))
            tensors = observed_tensors(total)
        part.update(tensors)
        self.done.add(position)
        if time.monotonic() >= self._write_at:
            started = time.monotonic()
            self._write()
            self._write_at = time.monotonic() + _PAUSE * (time.monotonic() - started)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nobody cleans the file up while the block runs, however old it is."""
        lease = self._store.catalog.lease(self._key, uuid.uuid4().hex)
        with nullcontext() if lease is None else lease:  # None: another run holds it, which does as well
            yield

    def remove(self) -> None:
        """The calibration is made: nothing is left to go on with."""
        self._blobs.remove(self._key)

    def _observed(self, tensors: Tensors) -> Observed:
        return observed_of(tensors, self._layout, self._settings)

    def _write(self) -> None:
        named = {
            f"{number}.{name}": one for number, part in enumerate(self._parts) for name, one in part.items()
        }
        ready = lay_out(_SumsManifest(done=tuple(sorted(self.done))), named)
        self._blobs.put(self._key, ready.write)

    def _read(self) -> None:
        with self._blobs.open(self._key) as file:
            header = open_header(file)
            manifest = parse_manifest(header, _SumsManifest, FORMAT, VERSION)
            named = read_tensors(file, header, manifest.tensors)
        parts: list[Tensors] = [{} for _ in self._parts]
        known = {str(number): part for number, part in enumerate(parts)}
        for name, tensor in named.items():
            number, _, own = name.partition(".")
            if number not in known:
                raise CorruptArtifact(f"tensor {name[:40]} is of no part")
            known[number][own] = tensor
        self._check(manifest.done, parts)
        self._parts, self.done = parts, set(manifest.done)

    def _check(self, done: Sequence[int], parts: Sequence[Tensors]) -> None:
        """See that each part holds all sums, and those of documents that are done.

        Raises:
            CorruptArtifact
        """
        if not all(0 <= position < self._documents for position in done):
            raise CorruptArtifact(f"documents {list(done)[:5]} are done, of {self._documents}")
        if {position % len(parts) for position in done} != {n for n, part in enumerate(parts) if part}:
            raise CorruptArtifact("the parts are not those of the documents that are done")
        for part in filter(None, parts):
            check_observed(part, self._layout, self._settings)


def _probes_sha256(sample: Sequence[ProbedPrefix]) -> str:
    probes = [[[probe.token_ids, probe.counted] for probe in one.probes] for one in sample]
    return hashlib.sha256(json.dumps(probes).encode("ascii")).hexdigest()
