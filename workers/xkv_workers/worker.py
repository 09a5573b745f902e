"""A worker: holds the model, turns token ids into published artifacts. Runs as a Ray actor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from xkv_artifacts.errors import CatalogUnavailable, XKVError
from xkv_artifacts.manifest import Fidelity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_workers.errors import FidelityTooLow
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import Failed, Outcome, PrefixJob, Retry, Stored, WorkerConfig
from xkv_workers.place import open_place
from xkv_workers.plan import reason_of

if TYPE_CHECKING:
    import torch

    from xkv_service.calibration.calibration import Calibration
    from xkv_service.factors import PrefixFactors
    from xkv_service.modeling.models import LoadedModel
    from xkv_service.prefilling.prefilled import Prefill


@dataclass(frozen=True)
class Made:
    """Factors that can be published.

    Args:
        low: their fidelity is. tried: others were tried instead.
        retry: what that brought, and under which id, when they are from one.
    """

    factors: PrefixFactors
    low: bool
    tried: bool = False
    retry: Retry | None = None
    retry_id: str | None = None


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
            stream = _beside(model.model.device)
        with stream:
            return tuple(
                factors if isinstance(factors, Failed) else self._publish(model, store, job, factors)
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
    ) -> Iterator[tuple[PrefixJob, Made | Failed]]:
        """Factors of each job on the model's device, and their exact caches let go of."""
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
                    spec, parts = self._config.spec, self._config.parts
                    made = compress_prefill(loaded.model, prefill, spec, self._calibration, parts=parts)
                    prefill.free()
                    yield job, self._improved(loaded, job, made)
                except XKVError as error:
                    yield job, Failed(job.artifact_id, reason_of(error))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        finally:
            for prefill in prefills:
                prefill.free()

    def _improved(self, loaded: LoadedModel, job: PrefixJob, first: PrefixFactors) -> Made:
        """The factors, or those of another try when their fidelity is low and the other's is better.

        Of several better ones it is that of the least divergence.
        """
        from xkv_service.compression import compress_each

        standard = Standard("keep", self._config.min_fidelity, self._calibration)
        before = _measured(first)
        low = standard.is_low(before, first.spec.ratio)
        if not low or not self._config.retries:
            return Made(first, low)
        ids, specs, parts = list(job.token_ids), self._config.retries, self._config.parts
        tried = compress_each(loaded.model, ids, specs, self._calibration, parts=parts)
        better = [
            one
            for one in tried
            if _measured(one).kl < before.kl and _measured(one).top1_agreement >= before.top1_agreement
        ]
        if not better:
            return Made(first, low, tried=True)
        best = min(better, key=lambda one: _measured(one).kl)
        return Made(
            best,
            standard.is_low(_measured(best), best.spec.ratio),
            tried=True,
            retry=Retry(before.top1_agreement, before.kl, _measured(best).kl),
            retry_id=job.retry_ids[self._config.retries.index(best.spec)],
        )

    def _publish(self, loaded: LoadedModel, store: ArtifactStore, job: PrefixJob, made: Made) -> Outcome:
        own_id = made.retry_id or job.artifact_id
        try:
            manifest = self._manifest(loaded, job, own_id, made)
            agreement = manifest.fidelity.top1_agreement
            if made.low and self._config.refuse_low:
                raise FidelityTooLow(
                    f"fidelity {agreement:.3f} (KL {manifest.fidelity.kl:.4f}) is low: not published",
                    hint="use a lower --ratio, or --on-low-fidelity retry",
                )
            if agreement < self._config.min_fidelity:
                raise FidelityTooLow(
                    f"fidelity {agreement:.3f} is below {self._config.min_fidelity:g}: not published",
                    hint="use a lower --ratio or more ranks",
                )
            pinned, ttl_s = self._config.pinned, self._config.ttl_s
            store.publish(manifest, made.factors.to_tensors(), pinned=pinned, ttl_s=ttl_s)
            size = store.blobs.size(own_id)
        except CatalogUnavailable as error:
            return Failed(job.artifact_id, reason_of(error), again=True)
        except XKVError as error:
            return Failed(job.artifact_id, reason_of(error))
        return Stored(
            artifact_id=job.artifact_id,
            tokens=manifest.tokens,
            bytes_full=manifest.bytes_full,
            bytes_stored=size,
            fidelity=agreement,
            kl=manifest.fidelity.kl,
            retry_id=made.retry_id,
            retry=made.retry,
            low=made.low,
            parts=bool(manifest.fidelity.parts),
        )

    def _manifest(self, loaded: LoadedModel, job: PrefixJob, own_id: str, made: Made) -> PrefixManifest:
        return PrefixManifest(
            id=own_id,
            model=loaded.identity,
            namespace=self._config.namespace,
            document=job.document,
            instead_of=None if made.retry_id is None else job.artifact_id,
            retried=made.tried and made.retry_id is None,
            created=datetime.now(timezone.utc),
            **made.factors.manifest_fields(),
        )


def _beside(device: torch.device) -> AbstractContextManager[object]:
    """A stream of its own from here on: copies there do not wait for what the next batch computes."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _measured(factors: PrefixFactors) -> Fidelity:
    assert factors.fidelity is not None
    return factors.fidelity
