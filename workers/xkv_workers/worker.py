"""A worker: holds the model, turns token ids into published artifacts. Runs as a Ray actor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from xkv_artifacts.errors import CatalogUnavailable, XKVError
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_workers.errors import FidelityTooLow
from xkv_workers.messages import Failed, Outcome, PrefixJob, Stored, WorkerConfig
from xkv_workers.place import open_place
from xkv_workers.plan import reason_of

if TYPE_CHECKING:
    from xkv_service.calibration.calibration import Calibration
    from xkv_service.factors import PrefixFactors
    from xkv_service.modeling.models import LoadedModel
    from xkv_service.prefilling.prefilled import Prefill


class PrefixWorker:
    """Computes batches of prefixes.

    Two calls run at once: while one writes its blobs, the next one prefills. A lock lets one at a time use
    the model.

    Args:
        loaded, store: the model and the store, where the caller has them; else they are opened when needed.
    """

    def __init__(
        self, config: WorkerConfig, loaded: LoadedModel | None = None, store: ArtifactStore | None = None
    ) -> None:
        self._config = config
        self._turn = threading.Lock()
        self._loaded, self._store = loaded, store
        self._calibration: Calibration | None = None

    def greet(self) -> None:
        """Answer, as soon as there is a process that can."""

    def load(self) -> None:
        """Load the model and open the store.

        Raises:
            XKVError: one of them cannot be had, or the model is not the one the run was planned with.
        """
        with self._turn:
            self._ready()

    def compute(self, jobs: Sequence[PrefixJob]) -> tuple[Outcome, ...]:
        """Compress each job's prefix and publish it; one outcome per job, in order."""
        with self._turn:
            model, store = self._ready()
            made = list(self._compress(model, jobs))
        return tuple(
            self._publish(model, store, job, factors) if not isinstance(factors, Failed) else factors
            for job, factors in made
        )

    def _ready(self) -> tuple[LoadedModel, ArtifactStore]:
        if self._loaded is None or self._store is None:
            self._loaded, self._store = open_place(self._config.place)
        if self._calibration is None and self._config.spec.calibration is not None:
            from xkv_service.calibration.storage import load_calibration

            self._calibration = load_calibration(self._store, self._config.spec.calibration)
        return self._loaded, self._store

    def _compress(
        self, loaded: LoadedModel, jobs: Sequence[PrefixJob]
    ) -> Iterator[tuple[PrefixJob, PrefixFactors | Failed]]:
        """Factors of each job on the CPU, and their exact caches let go of."""
        import torch

        from xkv_service.compression import compress_prefill
        from xkv_service.fidelity import held_back
        from xkv_service.prefilling.prefill import prefill_batch

        prefills: list[Prefill] = []
        try:
            documents = [torch.tensor(job.token_ids) for job in jobs]
            tails = [held_back(job.tokens) for job in jobs]
            prefills = prefill_batch(loaded.model, documents, tail=tails)
            for job, prefill in zip(jobs, prefills, strict=True):
                try:
                    yield job, compress_prefill(loaded.model, prefill, self._config.spec, self._calibration)
                except XKVError as error:
                    yield job, Failed(job.artifact_id, reason_of(error))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        finally:
            for prefill in prefills:
                prefill.free()

    def _publish(
        self, loaded: LoadedModel, store: ArtifactStore, job: PrefixJob, factors: PrefixFactors
    ) -> Outcome:
        try:
            manifest = self._manifest(loaded, job, factors)
            agreement = manifest.fidelity.top1_agreement
            if agreement < self._config.min_fidelity:
                raise FidelityTooLow(
                    f"fidelity {agreement:.3f} is below {self._config.min_fidelity:g}: not published",
                    hint="use a lower --ratio or more ranks",
                )
            store.publish(manifest, factors.to_tensors())
            size = store.blobs.size(job.artifact_id)
        except CatalogUnavailable as error:
            return Failed(job.artifact_id, reason_of(error), again=True)
        except XKVError as error:
            return Failed(job.artifact_id, reason_of(error))
        return Stored(job.artifact_id, manifest.tokens, manifest.bytes_full, size, agreement)

    def _manifest(self, loaded: LoadedModel, job: PrefixJob, factors: PrefixFactors) -> PrefixManifest:
        return PrefixManifest(
            id=job.artifact_id,
            model=loaded.identity,
            namespace=self._config.namespace,
            document=job.document,
            created=datetime.now(timezone.utc),
            **factors.manifest_fields(),
        )
