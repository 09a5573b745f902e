"""Documents of a task as a calibration's sample takes them: questions and right answers as probes."""

from __future__ import annotations

from random import Random
from typing import Any

from xkv_service.calibration.probes import Probe, ProbedPrefix
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.tasks.base import Room
from xkv_service.evaluation.tasks.registry import find_tasks


def probed_document(tokenizer: Any, task: str, seed: str, tokens: int, questions: int) -> ProbedPrefix:
    """One document of a task, always the same for a seed.

    Args:
        tokenizer: of the model. tokens: length of the document, about. questions: about it.
    """

    def measure(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    room = Room(tokens, measure, lambda text, question: measure(text))
    sample = find_tasks([task])[0].make(Random(seed), room, questions)
    renderer = Renderer(tokenizer)
    prefix = renderer.prefix(sample.document)
    probes = []
    for question in sample.questions:
        prompt = renderer.prompt(sample.document, [], question.text)
        reply = renderer.reply(question.expected[0])
        probes.append(Probe(tuple(prompt[len(prefix) :] + reply), len(reply) + 1))
    return ProbedPrefix(f"{task} {seed}", tuple(prefix), tuple(probes))
