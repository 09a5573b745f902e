"""Run methods over tasks: every method on the same documents and questions, from one exact prefill each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

import torch

from xkv_service.demo import demo_model_path
from xkv_service.errors import InvalidSpec, XKVError
from xkv_service.evaluation.plan import Plan
from xkv_service.evaluation.protocols import Examiner, Prefix, prefixes
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.results import BASELINE, Cell, Marks, Results
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Task
from xkv_service.fidelity import held_back
from xkv_service.modeling.models import LoadedModel
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill

Observe = Callable[["Step"], None]


@dataclass(frozen=True)
class Step:
    """One document is done: how many of how many, what it was, and the results up to here."""

    done: int
    total: int
    task: str
    length: int
    results: Results


def evaluate(loaded: LoadedModel, plan: Plan, observe: Observe = lambda step: None) -> Results:
    """Measure everything in a plan.

    Raises:
        InvalidSpec: the lengths do not suit the model or the tasks.
        InvalidPrompt: the chat template has no stable prefix.
        UnsupportedModel: the model's cache cannot be compressed.
    """
    return _Run(loaded, plan).results(observe)


class _Run:
    def __init__(self, loaded: LoadedModel, plan: Plan) -> None:
        self.loaded, self.plan = loaded, plan
        has_template = bool(getattr(loaded.tokenizer, "chat_template", None))
        self.renderer = Renderer(loaded.tokenizer, plan.template or ("chat" if has_template else "raw"))
        self._refuse_long(max(plan.lengths))
        self._results = Results(_about(loaded, plan, self.renderer))

    def results(self, observe: Observe) -> Results:
        jobs = [
            (length, task, number)
            for length in self.plan.lengths
            for task in self.plan.tasks
            for number in self.plan.documents()
        ]
        for done, (length, task, number) in enumerate(jobs, 1):
            self._examine(task, length, number)
            observe(Step(done, len(jobs), task.name, length, self._results))
        return self._results

    def _examine(self, task: Task, length: int, number: int) -> None:
        sample = self.sample(task, length, number)
        window = self.loaded.context_window
        examiner = Examiner(self.loaded.model, self.renderer, self.plan.protocol, task, window)
        totals = {Cell(task.name, length, name): _Total() for name in self.plan.methods}
        for prefix in prefixes(self.plan.protocol, self.renderer, sample):
            self._ask_all(prefix, sample.document, examiner, totals)
        for cell, total in totals.items():
            self._results.add(cell, total.marks(self.plan.seed, number))

    def _ask_all(self, prefix: Prefix, document: str, examiner: Examiner, totals: dict[Cell, _Total]) -> None:
        """Prefill a prefix once and ask every method its questions."""
        self._refuse_long(len(prefix.token_ids))
        # With a tail, methods can run the prefix's end again in models with windows or states.
        exact = prefill(self.loaded.model, prefix.token_ids, tail=held_back(len(prefix.token_ids)))
        try:
            for cell, total in totals.items():
                if cell not in self._results.notes:
                    self._measure(cell, exact, prefix, document, examiner, total)
        finally:
            exact.free()

    def sample(self, task: Task, length: int, number: int) -> Sample:
        """The document of that number: the same on every machine, whatever else is run."""
        rng = Random(f"{self.plan.seed}/{task.name}/{length}/{number}")

        def prompt(document: str, question: Question) -> int:
            return len(self.renderer.prompt(document, [], question.text, question.answer_prefix))

        room = Room(length, self.renderer.measure, prompt)
        return task.make(rng, room, self.plan.questions(number))

    def _measure(
        self, cell: Cell, exact: Prefill, prefix: Prefix, document: str, examiner: Examiner, total: _Total
    ) -> None:
        try:
            prepared = self.plan.methods[cell.method].prepare(self.loaded.model, exact)
            scores = examiner.scores(prepared, prefix, document)
        except XKVError as error:
            if cell.method == BASELINE:
                raise
            self._results.notes[cell] = error.message
            return
        total.scores += scores
        total.tokens += prepared.tokens
        total.bytes_full += exact.layout.bytes_full(exact.tokens)
        total.bytes_stored += prepared.nbytes

    def _refuse_long(self, tokens: int) -> None:
        window = self.loaded.context_window
        if window is not None and tokens > window:
            raise InvalidSpec(
                f"length {tokens} is beyond the model's window of {window} tokens",
                hint="ask for shorter documents",
            )


class _Total:
    """Marks of one method and document, prefix after prefix."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.tokens = self.bytes_full = self.bytes_stored = 0

    def marks(self, seed: int, number: int) -> Marks:
        return Marks(seed, number, tuple(self.scores), self.tokens, self.bytes_full, self.bytes_stored)


def _about(loaded: LoadedModel, plan: Plan, renderer: Renderer) -> dict[str, Any]:
    """What was run, as JSON values."""
    return {
        "model": _model_name(loaded),
        "fingerprint": loaded.identity.fingerprint,
        "dtype": loaded.identity.dtype,
        "device": _device_name(loaded),
        "protocol": plan.protocol.name,
        "in_turn": plan.protocol.in_turn,
        "template": renderer.template,
        "samples": plan.samples,
        "per_document": plan.per_document,
        "seed": plan.seed,
        "shard": f"{plan.shard.index}/{plan.shard.count}",
        "haystack": plan.haystack,
        "qa_data": plan.qa_data,
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("torch", "transformers", "xkv-service"):
        with suppress(metadata.PackageNotFoundError):  # run from a checkout
            yield name, metadata.version(name)


def _model_name(loaded: LoadedModel) -> str:
    bundled = Path(loaded.model.name_or_path) == demo_model_path()
    return "bundled" if bundled else loaded.identity.name


def _device_name(loaded: LoadedModel) -> str:
    device = loaded.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
