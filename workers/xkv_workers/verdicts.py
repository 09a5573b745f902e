"""Whether stored artifacts are of low fidelity, for people who look at a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, UnsupportedFormat
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.figure_checks import check_figures
from xkv_service.calibration.limits import fidelity_limit
from xkv_service.numeric import is_number
from xkv_workers.report import LOW_FIDELITY

_UNREADABLE = (ArtifactNotFound, CorruptArtifact, UnsupportedFormat)


@dataclass(frozen=True)
class Verdict:
    """What is said of an artifact's fidelity.

    Args:
        low: answers from the artifact may well be wrong.
        limit: divergence (nats) above which it is; None where no calibration says: it is below a top-1
            agreement of `LOW_FIDELITY` then.
    """

    low: bool
    limit: float | None


class Verdicts:
    """Judges the artifacts of one store, each calibration's header read once at most.

    An artifact's own limit counts, or else that of the calibration that it names, if the store has it.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._figures: dict[str, Mapping[str, Any]] = {}

    def of(self, manifest: PrefixManifest) -> Verdict:
        """Of an artifact, by its manifest."""
        fidelity = manifest.fidelity
        limit = fidelity.kl_limit
        if limit is None:
            limit = self._limit(manifest.spec)
        return _verdict(fidelity.top1_agreement, fidelity.kl, limit)

    def of_entries(self, entries: Iterable[Entry]) -> dict[str, Verdict]:
        """Of what a catalog lists, by id.

        Headers of blobs are read where the catalog does not say enough: of artifacts with a calibration but
        no limit, and of those that were listed before entries had a divergence. What cannot be read has none.
        """
        return {entry.id: found for entry in entries if (found := self._of_entry(entry)) is not None}

    def _of_entry(self, entry: Entry) -> Verdict | None:
        if entry.kl is not None and (entry.kl_limit is not None or entry.calibration is None):
            return _verdict(entry.fidelity, entry.kl, entry.kl_limit)
        try:
            return self.of(self._store.manifest(entry.id))
        except _UNREADABLE:
            return None

    def _limit(self, spec: Mapping[str, Any]) -> float | None:
        calibration, ratio = spec.get("calibration"), spec.get("ratio")
        if not isinstance(calibration, str) or not is_artifact_id(calibration) or not is_number(ratio):
            return None
        if calibration not in self._figures:
            self._figures[calibration] = self._read(calibration)
        return fidelity_limit(ratio, self._figures[calibration])

    def _read(self, calibration_id: str) -> Mapping[str, Any]:
        try:
            figures = self._store.calibrations.manifest(calibration_id).figures
            check_figures(calibration_id, figures)
        except _UNREADABLE:
            return {}
        return figures


def _verdict(agreement: float, kl: float, limit: float | None) -> Verdict:
    return Verdict(agreement < LOW_FIDELITY if limit is None else kl > limit, limit)
