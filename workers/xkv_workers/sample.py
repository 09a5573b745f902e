"""From documents, and questions about them, to the sample that a calibration is made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from xkv_artifacts.errors import XKVError
from xkv_service.calibration.probes import Probe, ProbedPrefix
from xkv_service.evaluation.rendering import Renderer
from xkv_workers.corpus import CorpusFile, Document, Rejected, read_file
from xkv_workers.errors import BadDocument
from xkv_workers.plan import reason_of, too_long

MOST_QUESTIONS = 8
"""Of one document: more tell little that is new, and each is run hundreds of times."""

_LINE_BYTES = 2**16


@dataclass(frozen=True)
class Sampling:
    """How documents become probed prefixes.

    Args:
        questions: a folder with `name.questions.jsonl` for a document `name.ext`; None, or no such file: the
            document's own end is the probe.
        window: tokens the model can read, None when it does not say.
    """

    renderer: Renderer
    questions: Path | None
    window: int | None

    def read(self, files: Sequence[CorpusFile | Rejected]) -> Iterator[ProbedPrefix | Rejected]:
        """Each document, or why it is left out."""
        for file in files:
            for document in [file] if isinstance(file, Rejected) else read_file(file):
                yield document if isinstance(document, Rejected) else self._probed(document)

    def _probed(self, document: Document) -> ProbedPrefix | Rejected:
        try:
            prefix = self.renderer.prefix(document.text)
            path = self.questions_about(document.uri)
            asked = [] if path is None else read_questions(path)
            probes = tuple(self._probe(document.text, len(prefix), *one) for one in asked)
        except XKVError as error:
            return Rejected(document.uri, reason_of(error))
        longest = len(prefix) + max((len(probe.token_ids) for probe in probes), default=0)
        if reason := too_long(longest, self.window):
            return Rejected(document.uri, reason)
        if not probes:
            return ProbedPrefix.of_text(document.uri, prefix)
        return ProbedPrefix(document.uri, tuple(prefix), probes)

    def _probe(self, text: str, prefix: int, question: str, answer: str) -> Probe:
        """Question and answer behind the prefix; what is compared is the answer, its first token included."""
        reply = self.renderer.reply(answer)
        return Probe((*self.renderer.prompt(text, [], question)[prefix:], *reply), len(reply) + 1)

    def questions_about(self, uri: str) -> Path | None:
        """The file of questions about a document, if there is one."""
        if self.questions is None or "#" in uri:
            return None
        path = self.questions / f"{PurePosixPath(uri).stem}.questions.jsonl"
        return path if path.exists() else None


def read_questions(path: Path) -> list[tuple[str, str]]:
    """The first (question, answer) pairs of a file of lines {"question", "answer"}.

    Raises:
        BadDocument: it cannot be read, or a line is something else.
    """
    try:
        with path.open("rb") as file:
            lines = list(islice(iter(lambda: file.readline(_LINE_BYTES), b""), MOST_QUESTIONS))
    except OSError as error:
        raise BadDocument(f"{path.name} cannot be read: {error.strerror or error}") from None
    return [_pair(line, f"{path.name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _pair(line: bytes, place: str) -> tuple[str, str]:
    wanted = 'lines are {"question": ..., "answer": ...}'
    if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
        raise BadDocument(f"{place} is no question: it has {_LINE_BYTES:,} bytes or more", hint=wanted)
    try:
        record = json.loads(line)
        question, answer = record["question"], record["answer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        question = answer = None
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()):
        raise BadDocument(f"{place} is no question", hint=wanted)
    return question, answer
