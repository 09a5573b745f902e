"""Calibrate a model on a sample of documents: everything but the tensors runs in the driver process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_service.calibration.calibrate import refuse_unreachable, split
from xkv_service.calibration.observed import calibrated_layers
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.report.about import report_figures
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.statistics import document_digest
from xkv_service.calibration.storage import check_made_for, known_documents
from xkv_service.evaluation.rendering import Renderer
from xkv_workers.calibration_choice import newest_or_bundled
from xkv_workers.calibration_crew import CalibrationCrew
from xkv_workers.corpus import Rejected
from xkv_workers.errors import CorpusError
from xkv_workers.inventory import resolve_calibration
from xkv_workers.observer import Observer, Progress, Silent
from xkv_workers.partial_sums import PartialSums
from xkv_workers.precompute import Prepared, prepared
from xkv_workers.report import DocumentError
from xkv_workers.request import Request
from xkv_workers.sample import Sampling

_TURN_SECONDS = 0.2


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate. The fields are the options of `xkv calibrate`.

    Args:
        corpus: documents, model, store and workers, as for precompute.
        questions: a folder of questions about the documents, see `Sampling`.
        earlier: first digits of a stored calibration whose sums the documents are added to.
        ratio, group_size: see `CalibrationSettings`; None is the default for the model.
    """

    corpus: Request
    questions: Path | None = None
    earlier: str | None = None
    ratio: float | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        given = {"ratio": self.ratio, "group_size": self.group_size}
        CalibrationSettings(**{name: one for name, one in given.items() if one is not None})  # type: ignore[arg-type]

    @classmethod
    def create(
        cls,
        *,
        questions: Path | None,
        ratio: float | None,
        group_size: int | None,
        earlier: str | None = None,
        **corpus: Any,
    ) -> CalibrationRequest:
        """From the options as given.

        Raises:
            InvalidSpec, CorpusError: a value that no calibration can have.
        """
        return cls(Request.create(calibration="none", **corpus), questions, earlier, ratio, group_size)


@dataclass(frozen=True)
class CalibrationReport:
    """What came of it.

    Args:
        id: of the calibration in the store. model: its name.
        documents, tokens: of the sample; `held_out` of the documents were only tried on.
        replaced: id of the calibration that was used for this model before, or None.
        errors: documents left out. figures: what was measured.
    """

    id: str
    model: str
    documents: int
    held_out: int
    tokens: int
    replaced: str | None
    errors: tuple[DocumentError, ...]
    seconds: float
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def calibrate(request: CalibrationRequest, observer: Observer | None = None) -> CalibrationReport:
    """Make a calibration of the request's documents and publish it in the store.

    A run that was broken off goes on behind the last document that it wrote down.

    Raises:
        CorpusError: fewer than two documents can be used.
        ArtifactNotFound, ModelMismatch, InvalidSpec: the earlier calibration cannot be gone on from.
        XKVError: nothing can be done at all: no model, store, Redis or Ray, or a ratio beyond reach.
    """
    with prepared(request.corpus) as job:
        return _Calibrating(request, job, observer or Silent()).run()


class _Calibrating:
    """One run."""

    def __init__(self, request: CalibrationRequest, job: Prepared, observer: Observer) -> None:
        self._request, self._job, self._observer = request, job, observer
        layers = calibrated_layers(job.model.layout)
        self._settings = CalibrationSettings.of(layers, request.ratio, request.group_size)
        self._started = time.monotonic()
        self._errors: list[DocumentError] = []

    def run(self) -> CalibrationReport:
        earlier, known = self._earlier()
        used, held = split(self._sample(), self._settings, known)
        refuse_unreachable(self._job.model.layout, held, self._settings)
        seen = [one for one in used if document_digest(one) in known]
        new = [one for one in used if document_digest(one) not in known]
        model = self._job.model
        sums = PartialSums(self._job.store, model.fingerprint, model.layout, new, held, self._settings)
        if sums.done:
            self._observer.note(f"going on: {len(sums.done)} of {len(new)} documents were observed before")
        with sums.in_use():
            threads, crew = self._crew()
            self._observe(crew, sums, new)
            done = [*seen, *(new[position] for position in sorted(sums.done))]
            self._refuse_few(done, 1)
            more = f", {len(known)} more by calibration {earlier[:12]}" if earlier else ""
            counted = f"{len(sums.done)} document{'' if len(sums.done) == 1 else 's'}"
            self._observer.note(f"{counted} observed{more}: choosing metric and groups, and validating")
            before = newest_or_bundled(self._job.store, model.fingerprint)
            manifest = crew.decide(sums.parts, done, held, threads, earlier)
            sums.remove()
        replaced = None if before is None or before.id == manifest.id else before.id
        return self._report(manifest, len(held), replaced)

    def _earlier(self) -> tuple[str | None, frozenset[str]]:
        """The calibration to go on from, and the documents in it."""
        if self._request.earlier is None:
            return None, frozenset()
        store = self._job.store
        earlier = resolve_calibration(store, self._request.earlier)
        made_for = store.calibrations.manifest(earlier).model
        check_made_for(earlier, made_for, self._job.model.files.identity)
        return earlier, known_documents(store, earlier)

    def _sample(self) -> list[ProbedPrefix]:
        """Documents that can be used, each text once."""
        corpus, files = self._request.corpus, self._job.model.files
        renderer = Renderer(files.tokenizer, corpus.template, corpus.system_prompt)
        sampling = Sampling(renderer, self._request.questions, self._job.model.context_window)
        sample: dict[tuple[int, ...], ProbedPrefix] = {}
        for item in sampling.read(self._job.files):
            if isinstance(item, Rejected):
                self._errors.append(DocumentError(item.uri, item.reason))
            else:
                sample.setdefault(item.token_ids, item)
        found = list(sample.values())
        self._refuse_few(found, 2)
        questions = self._request.questions
        if questions is not None and not any(sampling.questions_about(one.name) for one in found):
            raise CorpusError(
                f"{questions} has no questions about any document",
                hint="those about name.txt are in name.questions.jsonl",
            )
        return found

    def _refuse_few(self, documents: Sequence[ProbedPrefix], least: int) -> None:
        if len(documents) >= least:
            return
        first = self._errors[0] if self._errors else None
        needed = "two, with --from too: one" if self._request.earlier else "two, one of them"
        raise CorpusError(
            f"usable documents: {len(documents)}; a calibration needs {needed} to check it on",
            hint=f"{first.document}: {first.reason}" if first else "give more documents",
        )

    def _crew(self) -> tuple[int, CalibrationCrew]:
        """Threads of a worker that has a machine for itself, and the workers."""
        while True:
            with self._job.turn() as ours:
                if ours:
                    crew = self._job.crew()
                    place = self._job.place(crew.threads)
                    room = self._job.room
                    threads = room.node_cpus if room and crew.device == "cpu" else crew.threads
                    return threads, CalibrationCrew(place, crew, self._settings)
            time.sleep(_TURN_SECONDS)

    def _observe(self, crew: CalibrationCrew, sums: PartialSums, used: Sequence[ProbedPrefix]) -> None:
        todo = {position: one for position, one in enumerate(used) if position not in sums.done}
        started, tokens = time.monotonic(), 0
        left = sum(len(one.token_ids) for one in todo.values())
        for number, (position, found) in enumerate(crew.observe(todo), 1):
            document = used[position]
            if isinstance(found, str):
                self._errors.append(DocumentError(document.name, found))
            else:
                sums.add(position, found)
                tokens += len(document.token_ids)
            left -= len(document.token_ids)
            settled = len(used) - len(todo) + number
            speed = tokens / (time.monotonic() - started)
            self._observer.progress(Progress(len(used), settled, False, True, tokens, left, speed, 0.0))

    def _report(self, manifest: CalibrationManifest, held: int, replaced: str | None) -> CalibrationReport:
        return CalibrationReport(
            id=manifest.id,
            model=manifest.model.name,
            documents=manifest.sample.documents,
            held_out=held,
            tokens=manifest.sample.tokens,
            replaced=replaced,
            errors=tuple(self._errors),
            seconds=round(time.monotonic() - self._started, 3),
            figures=report_figures(manifest),
        )
