"""When a prefix is compressed, and how its questions are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.chat import Chat
from xkv_service.evaluation.methods.base import PreparedPrefix
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.tasks.base import Question, Sample, Task, score


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    Attributes:
        name: what the command line and results call it.
        per_document: questions about each document, unless said otherwise.
        question_inside: the question is prefilled and compressed with the document.
        in_turn: the questions about a document make one conversation, in which the replies stay.
    """

    name: str
    per_document: int
    question_inside: bool = False
    in_turn: bool = False


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # The prefix is the document; the question is not known when it is compressed.
        Protocol("question-later", 1),
        # The prefix is the whole prompt but its last token, which the method's cache must answer from.
        Protocol("question-inside", 1, question_inside=True),
        # Five questions in a row in one conversation, on one compressed document.
        Protocol("five-turns", 5, in_turn=True),
        # Many questions about one compressed document, each a request with a fresh cache.
        Protocol("many-requests", 20),
    )
}


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        InvalidSpec: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise InvalidSpec(f"protocol {name!r} is unknown", hint=f"use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Prefix:
    """Tokens to prefill and compress, and the questions then asked on them."""

    token_ids: list[int]
    questions: tuple[Question, ...]


def prefixes(protocol: Protocol, renderer: Renderer, sample: Sample) -> Iterator[Prefix]:
    """The prefixes of one sample: the document, or one prompt for each question."""
    if not protocol.question_inside:
        yield Prefix(renderer.prefix(sample.document), sample.questions)
        return
    for question in sample.questions:
        ids = renderer.prompt(sample.document, [], question.text, question.answer_prefix)
        yield Prefix(ids[:-1], (question,))


@dataclass(frozen=True)
class Examiner:
    """Asks the questions of one task and scores the replies.

    Attributes:
        window: most tokens the model can take, or None when it does not say.
    """

    model: PreTrainedModel
    renderer: Renderer
    protocol: Protocol
    task: Task
    window: int | None = None

    def scores(self, prepared: PreparedPrefix, prefix: Prefix, document: str) -> list[float]:
        """One score, 0 to 1, for each question about a prefix, in order.

        Raises:
            InvalidSpec: a conversation outgrows the model's window.
        """
        with enable_xkv(self.model):
            return self._scores(prepared, prefix, document)

    def _scores(self, prepared: PreparedPrefix, prefix: Prefix, document: str) -> list[float]:
        if self.protocol.in_turn:
            return self._asked(self._chat(prepared, prefix, document), prefix.questions)
        return [
            mark
            for question in prefix.questions
            for mark in self._asked(self._chat(prepared, prefix, document), [question])
        ]

    def _chat(self, prepared: PreparedPrefix, prefix: Prefix, document: str) -> Chat:
        """A chat on a fresh cache. What is not a known answer is wrong: only later turns need its text."""
        decided = self.task.scoring == "exact" and not self.protocol.in_turn
        return Chat(
            self.model,
            self.renderer.tokenizer,
            prepared.cache(),
            prefix.token_ids,
            document,
            system_prompt=self.renderer.system_prompt,
            template=self.renderer.template,
            max_new_tokens=0 if decided else self.task.reply_tokens,
            fresh=prepared.cache,
        )

    def _asked(self, chat: Chat, questions: Sequence[Question]) -> list[float]:
        marks = []
        for question in questions:
            marks.append(self._ask(chat, question))
            if self.window is not None and len(chat.greedy.held) > self.window:
                raise InvalidSpec(
                    f"a conversation grew to {len(chat.greedy.held)} tokens, the model takes {self.window}",
                    hint="ask for shorter documents",
                )
        return marks

    def _ask(self, chat: Chat, question: Question) -> float:
        """A reply need not go on once it has everything: what follows cannot lower its score."""
        task, expected = self.task, question.expected
        if task.scoring == "exact":
            return float(
                chat.ask(question.text, expected[0], answer_prefix=question.answer_prefix).right is True
            )
        reply = chat.ask(
            question.text,
            answer_prefix=question.answer_prefix,
            enough=lambda text: score(task.scoring, expected, text) == 1.0,
        )
        return score(task.scoring, expected, reply.text)
