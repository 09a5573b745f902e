"""`Plan`: what an evaluation runs, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.base import Method
from xkv_service.evaluation.methods.registry import make_methods
from xkv_service.evaluation.protocols import Protocol, find_protocol
from xkv_service.evaluation.results import BASELINE
from xkv_service.evaluation.tasks.base import Task
from xkv_service.evaluation.tasks.haystack import read_haystack, written_prose
from xkv_service.evaluation.tasks.reading import read_squad, written_notes
from xkv_service.evaluation.tasks.registry import Material, find_tasks
from xkv_service.modeling.prompts import Template


@dataclass(frozen=True)
class Shard:
    """Part `index` (1 to `count`) of the documents: those whose number leaves `index` - 1 by `count`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From a text such as "2/4".

        Raises:
            InvalidSpec: it is not such a text.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise InvalidSpec(f"shard {text!r} is no part of a whole", hint="use i/n, 1/4 to 4/4 say")
        return cls(int(index), int(count))


@dataclass(frozen=True)
class Plan:
    """Everything to measure.

    Args:
        tasks, methods: what is asked, and how the prefix is held; "full" is among the methods.
        lengths: tokens; see the tasks for what they count.
        protocol: when the prefix is compressed and how questions are asked.
        samples: questions of each task and length, all shards together.
        per_document: questions about each document.
        seed: of all documents. shard: the part of them to run.
        template: "chat", "raw", or None for chat where the model has a template.
        haystack, qa_data: names of the files used, or None for this project's own texts.
    """

    tasks: tuple[Task, ...]
    methods: dict[str, Method]
    lengths: tuple[int, ...]
    protocol: Protocol
    samples: int
    per_document: int
    seed: int = 0
    shard: Shard = field(default_factory=Shard)
    template: Template | None = None
    haystack: str | None = None
    qa_data: str | None = None

    @classmethod
    def create(
        cls,
        *,
        tasks: Sequence[str],
        methods: Sequence[str],
        lengths: Sequence[int],
        protocol: str = "question-later",
        samples: int = 500,
        per_document: int | None = None,
        seed: int = 0,
        shard: str = "1/1",
        template: Template | None = None,
        haystack: Path | None = None,
        qa_data: Path | None = None,
    ) -> Plan:
        """A plan from what a person writes. "full" is put before the methods where it is missing.

        Raises:
            InvalidSpec: an unknown name, a number out of range, or a file that cannot be used.
        """
        essay = written_prose if haystack is None else read_haystack(haystack)
        passages = written_notes if qa_data is None else read_squad(qa_data)
        names = list(methods) if BASELINE in methods else [BASELINE, *methods]
        chosen = find_protocol(protocol)
        plan = cls(
            tuple(find_tasks(tasks, Material(essay, passages))),
            make_methods(names),
            tuple(dict.fromkeys(lengths)),
            chosen,
            samples,
            chosen.per_document if per_document is None else per_document,
            seed,
            Shard.parse(shard),
            template,
            None if haystack is None else haystack.name,
            None if qa_data is None else qa_data.name,
        )
        plan._check()
        return plan

    def documents(self) -> range:
        """Numbers of this shard's documents."""
        return range(self.shard.index - 1, math.ceil(self.samples / self.per_document), self.shard.count)

    def questions(self, number: int) -> int:
        """Questions about a document: fewer about the last one, but a conversation is never cut short."""
        if self.protocol.in_turn:
            return self.per_document
        return min(self.per_document, self.samples - number * self.per_document)

    def _check(self) -> None:
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values:
                raise InvalidSpec(f"no {name} were given", hint=f"give one or more {name}")
        for name, number in (("samples", self.samples), ("per_document", self.per_document)):
            if number < 1:
                raise InvalidSpec(f"{name}={number} is out of range", hint="use 1 or more")
        if min(self.lengths) < 1:
            raise InvalidSpec(f"length {min(self.lengths)} is out of range", hint="use 1 token or more")
        for task in self.tasks:
            if task.most_questions is not None and task.most_questions < self.per_document:
                raise InvalidSpec(
                    f"task {task.name} has {task.most_questions} question about a document, "
                    f"{self.protocol.name} asks {self.per_document}",
                    hint="leave the task out, or use --per-document 1 or another protocol",
                )
        if not self.documents():
            raise InvalidSpec(
                f"shard {self.shard.index}/{self.shard.count} has no documents",
                hint="use more samples or fewer shards",
            )
