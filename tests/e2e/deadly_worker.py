"""A worker that dies on one document and stumbles over another."""

from __future__ import annotations

import os
from collections.abc import Sequence

from xkv_workers.messages import Outcome, PrefixJob
from xkv_workers.worker import PrefixWorker


class DeadlyWorker(PrefixWorker):
    """Real in everything else."""

    def compute(self, jobs: Sequence[PrefixJob]) -> tuple[Outcome, ...]:
        """As the real one, unless a document is called deadly or strange."""
        if any("deadly" in job.document.uri for job in jobs):
            os._exit(1)
        if any("strange" in job.document.uri for job in jobs):
            raise ZeroDivisionError("by a strange document")
        return super().compute(jobs)
