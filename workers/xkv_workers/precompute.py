"""The main job: a corpus becomes published artifacts. Everything here runs in the driver process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

from xkv_artifacts.errors import XKVError
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.errors import InvalidSpec
from xkv_service.factorization.ranks import Size, size_of
from xkv_service.leading_part import SHARES, part_layout
from xkv_service.manifest_checks import checked_spec
from xkv_service.spec import CompressionSpec
from xkv_workers.calibration_choice import choose_calibration
from xkv_workers.cluster import Crew, Room, cluster, plan_crew, start_turn
from xkv_workers.corpus import CorpusFile, Rejected, list_files
from xkv_workers.errors import RayUnavailable
from xkv_workers.estimate import Forecast, Rate, forecast
from xkv_workers.low_fidelity import Standard, retry_specs
from xkv_workers.messages import ModelPlace, PrefixJob, WorkerConfig
from xkv_workers.model_choice import ChosenModel, choose_device, choose_model
from xkv_workers.observer import Observer, Silent
from xkv_workers.plan import Target, plan
from xkv_workers.pool import WorkerPool
from xkv_workers.report import Ledger, Parts, Report
from xkv_workers.request import Request
from xkv_workers.schedule import Scheduler
from xkv_workers.shelf import Shelf


def run(request: Request, observer: Observer | None = None) -> Report:
    """Compress every document of the request's corpus that is not in the store yet.

    Raises:
        XKVError: nothing can be done at all: no corpus, model, store, Redis or Ray. A document that cannot be
            done is in the report instead.
    """
    started = time.monotonic()
    ledger = Ledger()
    with prepared(request) as job, job.shelf() as shelf:
        scheduler = Scheduler(shelf, job, ledger, observer or Silent(), job.standard)
        scheduler.run(job.plan())
        if rate := scheduler.tokens_per_second:
            job.store.catalog.remember_rate(job.model.fingerprint, job.model.device, rate)
        parts = _parts(job.store, ledger) if request.parts else None
    return ledger.report(time.monotonic() - started, job.spec.calibration, parts)


def _parts(store: ArtifactStore, ledger: Ledger) -> Parts:
    """What there is of parts after a run. Headers of reused artifacts are read."""
    measured, unmeasured = ledger.measured, []
    for artifact_id in ledger.reused:
        with suppress(XKVError):  # the documents are done, and that it is gone by now changes nothing in that
            manifest = store.manifest(artifact_id)
            if manifest.fidelity.parts:
                measured += 1
            elif _has_parts(manifest):
                unmeasured.append(artifact_id)
    return Parts(measured, tuple(unmeasured))


def _has_parts(manifest: PrefixManifest) -> bool:
    """Whether there is a part to measure: short documents have too few columns to leave any out."""
    spec = checked_spec(manifest, len(manifest.tensors))
    return manifest.fidelity.positions > 0 and any(
        part_layout(group, spec, share) != group for group in manifest.groups for share in SHARES
    )


def estimate(request: Request) -> Forecast:
    """What `run` would do now; nothing is computed, and no artifact stored.

    Raises:
        XKVError: as `run`.
    """
    with prepared(request) as job:
        remembered = job.store.catalog.rate(job.model.fingerprint, job.model.device)
        rate = Rate.of(remembered, job.model.device)
        found = forecast(job.plan(), job.shelf().find, job.size, rate, job.standard)
        return replace(found, calibration=job.spec.calibration)


@dataclass
class Prepared:
    """A checked request: its files, store, model and spec. Ray is joined when the first worker is needed.

    Args:
        calibration: the one that the spec names, None when it names none.
    """

    request: Request
    files: Sequence[CorpusFile | Rejected]
    store: ArtifactStore
    model: ChosenModel
    stack: ExitStack
    room: Room | None
    spec: CompressionSpec
    calibration: Calibration | None

    def size(self, tokens: int) -> Size:
        """Bytes of a prefix of so many tokens; raises InvalidSpec when it cannot be compressed as asked."""
        return size_of(self.model.layout, tokens, self.spec, calibration=self.calibration)

    @property
    def standard(self) -> Standard:
        """How faithful the artifacts must be."""
        action = self.request.on_low_fidelity or ("retry" if self.calibration else "keep")
        return Standard(action, self.request.min_fidelity, self.calibration)

    @property
    def retries(self) -> tuple[CompressionSpec, ...]:
        """What is tried for artifacts of low fidelity."""
        return retry_specs(self.spec) if self.standard.action == "retry" else ()

    def shelf(self) -> Shelf:
        """The store as this run sees it."""
        return Shelf(self.store, self.standard, pin=self.request.pin, ttl_s=self.request.ttl_s)

    def _pays_to_copy(self) -> bool:
        """Whether several workers on one machine are worth loading a model for each."""
        return self.model.is_small and len(self.files) > 1

    def plan(self) -> Iterator[PrefixJob | Rejected]:
        """Jobs and rejections, document by document."""
        request = self.request
        render = partial(self.model.render, system_prompt=request.system_prompt, template=request.template)
        target = Target(
            fingerprint=self.model.fingerprint,
            namespace=request.namespace,
            spec=self.spec.canonical(),
            render=render,
            check_size=self.size,
            window=self.model.context_window,
            retries=[spec.canonical() for spec in self.retries],
        )
        return plan(self.files, target)

    def turn(self) -> AbstractContextManager[bool]:
        """Whether the workers may be started now; see `cluster.start_turn`."""
        return start_turn() if self.room is None else nullcontext(True)

    def start(self) -> WorkerPool:
        """Start the workers."""
        crew = self.crew()
        return WorkerPool(self.worker_config(crew.threads), crew)

    def crew(self) -> Crew:
        """Join Ray, and say how many workers to start there."""
        if self.room is None:
            self.room = self.stack.enter_context(cluster())
        return plan_crew(self.room, self.model.device, self.request.workers, small=self._pays_to_copy())

    def worker_config(self, threads: int) -> WorkerConfig:
        """What a worker with so many CPU threads needs to know."""
        request = self.request
        return WorkerConfig(
            self.place(threads),
            request.namespace,
            self.spec,
            min_fidelity=request.min_fidelity,
            retries=self.retries,
            refuse_low=request.on_low_fidelity == "fail",
            pinned=request.pin,
            ttl_s=request.ttl_s,
            parts=request.parts,
        )

    def place(self, threads: int) -> ModelPlace:
        """Where a worker with so many CPU threads finds model and store."""
        return ModelPlace(
            model=self.model.place,
            revision=self.request.revision,
            dtype=self.model.dtype,
            fingerprint=self.model.fingerprint,
            device=self.model.device,
            threads=threads,
            store_url=self.store.blobs.url,
            redis_url=self.store.redis_url,
        )


@contextmanager
def prepared(request: Request) -> Iterator[Prepared]:
    """Everything a run needs, in the order that finds a wrong argument soonest."""
    files = list_files(request.paths)
    with ExitStack() as stack:
        store = stack.enter_context(ArtifactStore.open(request.store_url, request.redis_url))
        room = stack.enter_context(cluster(request.ray_address)) if request.ray_address else None
        model = choose_model(request.model, request.revision, choose_device(request.device, room))
        model.check_template(system_prompt=request.system_prompt, template=request.template)
        if room is not None and room.nodes > 1 and store.redis_url.startswith("unix:"):
            raise RayUnavailable(
                f"{room.nodes} machines cannot share the embedded Redis of this one",
                hint="give --redis or XKV_REDIS_URL a Redis that all of them reach",
            )
        calibration = choose_calibration(store, model.files.identity, request.compression)
        spec = request.compression.spec(calibration)
        if request.parts and spec.basis != "calibrated":
            raise InvalidSpec(
                "parts of artifacts without a calibration's bases are not good enough to answer from",
                hint=f"{_way_to_bases(request, calibration)}, or leave --parts out",
            )
        yield Prepared(request, files, store, model, stack, room, spec, calibration)


def _way_to_bases(request: Request, calibration: Calibration | None) -> str:
    """What to do for artifacts that share a calibration's bases."""
    if calibration is None:
        return "see `xkv calibrate`"
    # Else the calibration found bases of each document's own best at this ratio.
    return "leave --basis document out" if request.compression.basis else "give --basis calibrated"
