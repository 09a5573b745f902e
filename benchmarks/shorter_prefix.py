"""The first p tokens of a longer artifact against compressing those p tokens: answers and error.

python benchmarks/shorter_prefix.py --out benchmarks/results/shorter_prefix.json

Each document is compressed alone, and once more as the beginning of a document several times as long; the
longer artifact is then used for its first p tokens. Both are asked the same questions, selecting by default,
and the error of the rebuilt keys of those tokens is taken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from bundled import measure_of
from report import Report, command, measured_on

from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, Question, make_document
from xkv_service.evaluation import Chat
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.reconstruct import rebuild

CASES = [(times, ratio) for times in (2, 4) for ratio in (8.0, 16.0)]


def main() -> None:
    """Measure or merge; print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.merge:
        found = [one for path in arguments.merge for one in json.loads(path.read_text())["found"]]
    else:
        loaded = load_model(arguments.model, device="cpu")
        part, parts = map(int, arguments.part.split("/"))
        numbers = range(part - 1, arguments.documents, parts)
        found = [row for number in numbers for row in _document(loaded, arguments, number)]
    report = Report("shorter_prefix", command(arguments.merge), "the same tokens compressed alone")
    for times, ratio in CASES:
        rows = [row for row in found if (row["times"], row["ratio"]) == (times, ratio)]
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        report.add(**mean | {"questions": sum(row["questions"] for row in rows)})
    report.write(arguments.out, found=found, **measured_on(arguments.merge))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shorter_prefix.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--tokens", type=int, default=2048, help="length of the shorter document")
    parser.add_argument("--documents", type=int, default=26)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th document")
    parser.add_argument("--merge", type=Path, nargs="+", help="parts to add up instead of measuring")
    return parser.parse_args()


def _document(loaded: LoadedModel, arguments: argparse.Namespace, number: int) -> Iterator[dict[str, float]]:
    for times, ratio in CASES:
        short, ids, longer = _documents(loaded, arguments.tokens, times, number)
        questions = Random(number).sample(list(short.questions), arguments.questions)
        # Without an index 16x can be reached; both ways then attend to every token.
        spec = CompressionSpec(ratio=ratio, index="sketch" if ratio < 10 else "none")
        row: dict[str, float] = {"times": times, "ratio": ratio, "questions": len(questions)}
        with torch.no_grad(), enable_xkv(loaded.model):
            exact = prefill(loaded.model, ids)
            for name, tokens in (("alone", ids), ("longer", longer)):
                factors = compress(loaded.model, tokens, spec)
                cache = XKVCache.from_factors(loaded.model, factors, tokens=len(ids))
                chat = Chat(loaded.model, loaded.tokenizer, cache, ids.tolist(), short.text)
                row[f"{name}_right_%"] = 100 * _right(chat, questions)
                row[f"{name}_key_error"] = _key_error(exact, factors)
        yield row


def _right(chat: Chat, questions: list[Question]) -> float:
    right = 0
    for question in questions:
        chat.restart()
        right += chat.ask(question.question, question.answer, enough=lambda text: True).right is True
    return right / len(questions)


def _key_error(exact: Prefill, factors: PrefixFactors) -> float:
    """Relative error of all rebuilt keys of the prefix's tokens."""
    distance = size = 0.0
    for layer in factors.layers:
        keys = exact.keys(layer)
        distance += float((rebuild(factors, layer, 0, exact.tokens)[0] - keys).square().sum())
        size += float(keys.square().sum())
    return (distance / size) ** 0.5


def _documents(
    loaded: LoadedModel, tokens: int, times: int, number: int
) -> tuple[Document, torch.Tensor, torch.Tensor]:
    """A document, the ids that its chats share with those of the longer one, and the longer one's ids."""
    rng, measure = Random(f"shorter {number}"), measure_of(loaded)
    short = make_document(rng, tokens, measure)
    rest = [make_document(rng, tokens, measure).text for _ in range(times - 1)]
    ids = render_prefix(loaded.tokenizer, short.text)
    longer = render_prefix(loaded.tokenizer, "\n\n".join([short.text, *rest]))
    common = next((i for i, (a, b) in enumerate(zip(ids, longer, strict=False)) if a != b), len(ids))
    return short, torch.tensor(ids[:common]), torch.tensor(longer)


if __name__ == "__main__":
    main()
