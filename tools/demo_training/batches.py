"""Training and evaluation batches, made by worker processes; batch ``i`` of a seed is always the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from demo_training.rendering import Renderer, Row
from demo_training.tokenizer import SPECIAL_TOKENS, load_tokenizer
from xkv_service.demo import documents, ruler_tasks

KINDS: tuple[str, ...] = ("copy", "fact", "chain", "list", *ruler_tasks.TASKS)

_HARD_TASKS = {"niah_multivalue": 3.0, "variable_tracking": 4.0, "niah_multikey_3": 2.0}
_TASK_WEIGHTS = [_HARD_TASKS.get(task, 1.0) for task in ruler_tasks.TASKS]
_SYSTEM_PROMPTS = (
    "You answer questions about the document.",
    "You are a careful assistant. Answer from the text only.",
    "Answer every question with a full sentence.",
    "You are the help desk of a large organisation. Be brief and exact.",
)


@dataclass(frozen=True)
class Shape:
    """Rows and tokens of a batch; ``answers`` bounds the answers of one row."""

    rows: int
    tokens: int

    @property
    def answers(self) -> int:
        """The most answers that fit a row (an answer and its question take twelve tokens at the least)."""
        return self.tokens // 12


@dataclass(frozen=True)
class Batch:
    """One batch: ``ids`` and ``answers`` [rows, tokens] int16, ``kinds`` [rows, answers] int8 (-1: none)."""

    ids: torch.Tensor
    answers: torch.Tensor
    kinds: torch.Tensor


def collate(rows: Sequence[Row], shape: Shape) -> Batch:
    """Pad rows (pad id 0, right side) to ``shape``; answers past the end are dropped."""
    ids = np.zeros((shape.rows, shape.tokens), np.int16)
    answers = np.zeros_like(ids)
    kinds = np.full((shape.rows, shape.answers), -1, np.int8)
    for i, row in enumerate(rows):
        length = min(len(row.ids), shape.tokens)
        ids[i, :length] = row.ids[:length]
        if len(row.ids) <= shape.tokens:
            answers[i, :length] = row.answers
            kinds[i, : len(row.kinds)] = [KINDS.index(kind) for kind in row.kinds]
    return Batch(*map(torch.from_numpy, (ids, answers, kinds)))


def copy_row(rng: np.random.Generator, tokens: int, vocabulary: int) -> Row:
    """Random tokens, twice or more: the model has to say the repetitions."""
    period = int(rng.integers(tokens // 4, tokens // 2 + 1))
    once = rng.integers(len(SPECIAL_TOKENS), vocabulary, period).tolist()
    row = Row()
    row.context(once + once[:2])
    row.answer((once * (tokens // period + 1))[2 : tokens - period], "copy")
    return row


def fact_row(rng: Random, renderer: Renderer, tokens: int, ruler_share: float) -> Row:
    """A conversation of up to ``tokens`` tokens about a readable document or a RULER haystack."""
    size = round(tokens * rng.uniform(0.45, 0.9 if tokens > 600 else 0.6))
    if rng.random() < ruler_share:
        spread = rng.randint(1, max(1, size // 300))
        task = rng.choices(ruler_tasks.TASKS, _TASK_WEIGHTS)[0]
        document = ruler_tasks.make_task(task, rng, size, renderer.count, spread)
    else:
        document = documents.make_document(rng, size, renderer.count)
    questions = rng.sample(document.questions, len(document.questions))
    if rng.random() < 0.1:
        return renderer.raw(document.text, questions, tokens)
    system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    gap = "\n\n\n" if rng.random() < 0.1 else "\n\n"
    return renderer.chat(document.text, questions, tokens, system, gap)


class StageData(Dataset[Batch]):
    """Batch ``i`` of a stage: of one of its shapes, drawn by their weights."""

    def __init__(
        self,
        folder: Path,
        seed: str,
        shapes: Sequence[Shape],
        weights: Sequence[float],
        ruler_share: float | None,
    ) -> None:
        """Args as in ``stages.Stage``; ``ruler_share`` None means the copying task."""
        self.folder, self.seed, self.shapes, self.weights = folder, seed, shapes, weights
        self.ruler_share = ruler_share
        self._renderer: Renderer | None = None
        self._vocabulary = 0

    def __getitem__(self, index: int) -> Batch:
        rng = Random(f"{self.seed}/{index}")
        shape = rng.choices(self.shapes, self.weights)[0]
        if self._renderer is None:
            tokenizer = load_tokenizer(self.folder)
            self._renderer, self._vocabulary = Renderer(tokenizer), tokenizer.get_vocab_size()
        if self.ruler_share is None:
            noise = np.random.default_rng(rng.getrandbits(64))
            rows = [copy_row(noise, shape.tokens, self._vocabulary) for _ in range(shape.rows)]
        else:
            rows = [fact_row(rng, self._renderer, shape.tokens, self.ruler_share) for _ in range(shape.rows)]
        return collate(rows, shape)

    def __len__(self) -> int:
        return 2**31


class ExamData(Dataset[Batch]):
    """Held-out conversations: documents of ``tokens`` tokens, ``turns`` questions each."""

    def __init__(self, folder: Path, tokens: int, shape: Shape, turns: int, task: str | None) -> None:
        """``task`` names a RULER task; None means readable documents."""
        self.folder, self.tokens, self.shape, self.turns, self.task = folder, tokens, shape, turns, task

    def __getitem__(self, index: int) -> Batch:
        rng = Random(f"exam/{self.task}/{self.tokens}/{index}")
        renderer = Renderer(load_tokenizer(self.folder))
        rows = [self._row(rng, renderer) for _ in range(self.shape.rows)]
        return collate(rows, self.shape)

    def _row(self, rng: Random, renderer: Renderer) -> Row:
        if self.task:
            document = ruler_tasks.make_task(self.task, rng, self.tokens, renderer.count)
        else:
            document = documents.make_document(rng, self.tokens, renderer.count)
        questions = rng.sample(document.questions, min(self.turns, len(document.questions)))
        return renderer.chat(document.text, questions, self.shape.tokens)

    def __len__(self) -> int:
        return 2**31


def stream(data: Dataset[Batch], start: int, stop: int, workers: int) -> DataLoader[Batch]:
    """Iterate over batches ``start`` to ``stop`` in order, made ahead by ``workers`` processes."""
    return DataLoader(
        data,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
