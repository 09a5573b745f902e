"""Of the tokens that a decode step chooses: how many had the step before chosen, in the same layer?

    python benchmarks/reuse.py --out benchmarks/results/reuse.json
    python benchmarks/reuse.py --model runs/second/model --out benchmarks/results/reuse_second_model.json

What keeping rebuilt keys from step to step could save, on answers that the bundled model gives to questions
about documents, with each layer's choice by its key sketch. Tokens that are rebuilt for every query count
for nothing here. The first step of an answer is held against the last token of its question.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from bundled import load, measure_of
from report import Report, command

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding.select import Selected, Selection
from xkv_service.demo.documents import make_document
from xkv_service.evaluation.rendering import Renderer
from xkv_service.modeling.tokens import end_tokens
from xkv_service.sessions.context import Context

_LONGEST = 48
"""Tokens of an answer at most."""


class Choices:
    """What every layer chose last, and the shares of it that it had chosen before."""

    def __init__(self) -> None:
        self._last: dict[int, torch.Tensor] = {}
        self.kept: defaultdict[int, list[float]] = defaultdict(list)

    def forget(self) -> None:
        """Another question begins."""
        self._last.clear()

    def note(self, selection: Selection, chosen: Selected) -> None:
        """A choice of one new token, or of several, of which the last one's counts."""
        positions = chosen.positions
        if chosen.member is not None:
            positions = positions[chosen.member[0, 0, -1]]
        open_ = positions[~torch.isin(positions, selection.always)]
        before = self._last.get(selection.prefix.layer)
        if before is not None and len(open_):
            self.kept[selection.prefix.layer].append(float(torch.isin(open_, before).float().mean()))
        self._last[selection.prefix.layer] = open_


def main() -> None:
    """Answer, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load(arguments.model)
    ends, renderer = end_tokens(loaded.model, loaded.tokenizer), Renderer(loaded.tokenizer)
    report = Report("reuse", command(), "every token chosen anew")
    real: Any = Selection.__call__
    for tokens in arguments.tokens:
        found = {budget: Choices() for budget in arguments.budgets}
        for seed in range(arguments.documents):
            document = make_document(Random(1000 + seed), tokens, measure_of(loaded))
            ids = renderer.prefix(document.text)
            factors = compress(
                loaded.model, torch.tensor(ids), CompressionSpec(ratio=8.0, factor_dtype="int8")
            )
            for budget, choices in found.items():
                Selection.__call__ = _noting(real, choices)  # type: ignore[method-assign]
                for question in document.questions[: arguments.questions]:
                    prompt = renderer.prompt(document.text, [], question.question)
                    cache = XKVCache.from_factors(loaded.model, factors, SelectionSpec("sketch", budget))
                    choices.forget()
                    with enable_xkv(loaded.model):
                        _answer(Context(loaded.model, cache, list(ids)), prompt[len(ids) :], ends)
                Selection.__call__ = real  # type: ignore[method-assign]
        for budget, choices in found.items():
            layers = [mean(shares) for _, shares in sorted(choices.kept.items())]
            report.add(
                tokens=tokens, budget=budget, steps=len(next(iter(choices.kept.values()))), kept=mean(layers),
                least_kept=min(layers), most_kept=max(layers),
            )  # fmt: skip
    report.write(arguments.out, documents=arguments.documents, questions=arguments.questions)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reuse.json"))
    parser.add_argument("--model", help="another model's folder")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4000, 8000], help="of a document, about")
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 256, 512])
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--questions", type=int, default=8, help="about each document")
    return parser.parse_args()


def _noting(real: Any, choices: Choices) -> Any:
    def call(selection: Selection, *given: Any) -> Selected:
        chosen: Selected = real(selection, *given)
        choices.note(selection, chosen)
        return chosen

    return call


def _answer(context: Context, ids: list[int], ends: frozenset[int]) -> None:
    for _ in range(_LONGEST):
        token = int(context.advance(ids).argmax())
        if token in ends:
            return
        ids = [token]


if __name__ == "__main__":
    main()
