"""Have a document's artifact: read the document, find the artifact in the store, or make it here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from xkv_artifacts.errors import CorruptArtifact, MissingBlob, XKVError
from xkv_service.modeling.models import LoadedModel
from xkv_workers.corpus import CorpusFile, Document, Rejected, list_files, read_file
from xkv_workers.errors import CorpusError
from xkv_workers.messages import Failed, PrefixJob
from xkv_workers.precompute import Prepared
from xkv_workers.worker import PrefixWorker

_WAIT_SECONDS = 0.5

Tell = Callable[[str], None]


def read_document(path: Path) -> Document:
    """The one document in a file.

    Raises:
        CorpusError: there is none, or more than one.
    """
    if path.is_dir():
        raise CorpusError(f"{path} is a folder", hint="give a file with one document")
    found = [item for file in list_files((path,)) for item in _documents(file)]
    if len(found) != 1:
        raise CorpusError(f"{path} has {len(found)} documents", hint="give a file with one document")
    if not isinstance(found[0], Document):
        raise CorpusError(f"{path}: {found[0].reason}")
    return found[0]


def _documents(file: CorpusFile | Rejected) -> Iterable[Document | Rejected]:
    return [file] if isinstance(file, Rejected) else read_file(file)


def stored_somehow(job: Prepared, planned: PrefixJob, tell: Tell) -> str | None:
    """The artifact of these very tokens, however they were compressed; the most faithful one."""

    def on_lost(_: str, error: XKVError) -> None:
        if isinstance(error, MissingBlob | CorruptArtifact):
            tell(error.message)

    match = job.store.lookup(
        job.model.fingerprint,
        job.request.namespace,
        planned.token_ids,
        on_lost=on_lost,
    )
    if match is None or match.tokens < planned.tokens:
        return None
    return match.artifact_id if job.store.manifest(match.artifact_id).tokens == planned.tokens else None


def store_now(job: Prepared, planned: PrefixJob, loaded: LoadedModel, tell: Tell) -> str:
    """Compress and publish a prefix, unless it is stored or another process does it; the artifact's id."""
    told = False
    with job.shelf() as shelf:
        while (found := shelf.find(planned)) is None:
            if shelf.lease(planned.artifact_id):
                tell(f"not in the store yet: compressing {planned.tokens:,} tokens")
                config = job.worker_config(torch.get_num_threads())
                (outcome,) = PrefixWorker(config, loaded, job.store).compute([planned])
                if isinstance(outcome, Failed):
                    raise CorpusError(f"{planned.document.uri}: {outcome.reason}")
                return outcome.own_id
            if not told:
                tell("another process compresses this document: waiting for it")
            told = True
            time.sleep(_WAIT_SECONDS)
    return found.own_id
