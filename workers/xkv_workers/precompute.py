"""The main job: a corpus becomes published artifacts. Everything here runs in the driver process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from xkv_artifacts.store import ArtifactStore
from xkv_service.layout import ModelLayout
from xkv_service.models import ModelFiles, describe_model
from xkv_service.prompts import render_prefix
from xkv_service.ranks import Size, size_of
from xkv_workers.cluster import cluster, plan_crew
from xkv_workers.corpus import CorpusFile, Rejected, list_files
from xkv_workers.estimate import Forecast, Rate, forecast
from xkv_workers.messages import WorkerConfig
from xkv_workers.observer import Observer, Silent
from xkv_workers.plan import Target, plan
from xkv_workers.pool import WorkerPool
from xkv_workers.report import Ledger, Report
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
    with _prepared(request) as job, ExitStack() as stack:
        shelf = stack.enter_context(Shelf(job.store))
        scheduler = Scheduler(shelf, lambda: _open_pool(job, stack), ledger, observer or Silent())
        scheduler.run(plan(job.files, job.target))
        if scheduler.rate and scheduler.device:
            job.store.catalog.remember_rate(job.target.fingerprint, scheduler.device, scheduler.rate)
    return ledger.report(time.monotonic() - started)


def estimate(request: Request) -> Forecast:
    """What `run` would do now; nothing is computed or stored.

    Raises:
        XKVError: as `run`.
    """
    with _prepared(request) as job:
        device = _device_here(request.device)
        rate = Rate.of(job.store.catalog.rate(job.target.fingerprint, device), device)
        shelf = Shelf(job.store)
        return forecast(plan(job.files, job.target), shelf.find, job.size, rate)
