"""The bundled model's own tasks, worded as it was trained: not RULER's, and no figure of theirs compares.

`demo_documents` asks about registers, handbooks, notices and minutes (`xkv_service.demo.documents`) whatever
comes; `demo_facts`, `demo_chains` and `demo_lists` ask one kind of question; the others are the needle tasks
of `xkv_service.demo.ruler_tasks`. The whole reply must be right, character for character. A document is as
long as asked; question and reply come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from xkv_service.demo import ruler_tasks
from xkv_service.demo.documents import Document, make_document
from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Scoring

_ATTEMPTS = 20

Write = Callable[[Random, Room, int], Document]


@dataclass(frozen=True)
class DemoTask:
    """Questions of some kinds about documents of one sort.

    Attributes:
        write: writes a document with about so many questions.
        kinds: the kinds of question asked, or None for all.
    """

    name: str
    write: Write
    kinds: tuple[str, ...] | None = None
    scoring: Scoring = "exact"
    reply_tokens: int = 400
    most_questions: int | None = None

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`."""
        for _ in range(_ATTEMPTS):
            document = self.write(rng, room, questions)
            asked = [one for one in document.questions if self.kinds is None or one.kind in self.kinds]
            if len(asked) >= questions:
                chosen = rng.sample(asked, questions)
                return Sample(document.text, tuple(Question(one.question, (one.answer,)) for one in chosen))
        raise InvalidSpec(
            f"task {self.name} cannot ask {questions} questions about a document of {room.tokens} tokens",
            hint="ask for longer documents or fewer questions on each",
        )


def demo_tasks() -> list[DemoTask]:
    """All of them."""
    kinds = {"documents": None, "facts": ("fact",), "chains": ("chain",), "lists": ("list",)}
    tasks = [DemoTask(f"demo_{name}", _write_document, wanted) for name, wanted in kinds.items()]
    return tasks + [DemoTask(f"demo_{name}", _write_needles(name)) for name in ruler_tasks.TASKS]


def _write_document(rng: Random, room: Room, questions: int) -> Document:
    return make_document(rng, room.tokens, room.measure)


def _write_needles(name: str) -> Write:
    return lambda rng, room, questions: ruler_tasks.make_task(
        name, rng, room.tokens, room.measure, spread=questions
    )
