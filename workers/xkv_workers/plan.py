"""From a corpus file to artifact ids: render, tokenize, and refuse early what no worker could do."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xkv_artifacts.errors import XKVError
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef
from xkv_workers.corpus import CorpusFile, Document, Rejected, read_file
from xkv_workers.messages import PrefixJob

Render = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Target:
    """What the documents of a run become.

    Args:
        fingerprint, namespace, spec: of every artifact (`spec` in its canonical form).
        retries: specs tried for artifacts whose fidelity is low with `spec`, if any is.
        render: a document's text to the token ids of its prefix; raises InvalidPrompt.
        check_size: raises InvalidSpec when a prefix of so many tokens cannot be compressed as asked.
        window: tokens the model can read, None when it does not say.
    """

    fingerprint: str
    namespace: str
    spec: Mapping[str, Any]
    render: Render
    check_size: Callable[[int], object]
    window: int | None
    retries: Sequence[Mapping[str, Any]] = ()

    def id_of(self, token_ids: Sequence[int], spec: Mapping[str, Any]) -> str:
        """The id of the artifact of these tokens."""
        return artifact_id(self.fingerprint, self.namespace, token_ids, spec)


def plan(files: Sequence[CorpusFile | Rejected], target: Target) -> Iterator[PrefixJob | Rejected]:
    """A job for every document that can be compressed, in corpus order, and a reason for each other one."""
    for file in files:
        if isinstance(file, Rejected):
            yield file
            continue
        for document in read_file(file):
            yield document if isinstance(document, Rejected) else _plan(document, target)


def _plan(document: Document, target: Target) -> PrefixJob | Rejected:
    try:
        token_ids = array("i", target.render(document.text))
        if reason := too_long(len(token_ids), target.window):
            return Rejected(document.uri, reason)
        target.check_size(len(token_ids))
    except XKVError as error:
        return Rejected(document.uri, reason_of(error))
    return PrefixJob(
        target.id_of(token_ids, target.spec),
        token_ids,
        DocumentRef(uri=document.uri, sha256=document.sha256),
        tuple(target.id_of(token_ids, spec) for spec in target.retries),
    )


def too_long(tokens: int, window: int | None) -> str | None:
    """Why a prefix of so many tokens leaves no room in the model's window, in one line; None when it does."""
    if window is None or tokens < window:
        return None
    return f"too long: {tokens:,} tokens, and the model's window of {window:,} has to hold a chat as well"


def reason_of(error: XKVError) -> str:
    """An error as one line: what was wrong, and the hint in parentheses."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
