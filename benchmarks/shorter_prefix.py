"""The first p tokens of a longer artifact against compressing those p tokens: answers and error.

python benchmarks/shorter_prefix.py --out benchmarks/results/shorter_prefix.json

Each document is compressed alone, and once more as the beginning of a document several times as long; the
longer artifact is then used for its first p tokens. Both are asked the same questions, selecting by default,
and the error of the rebuilt keys of those tokens is taken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import torch
from bundled import measure_of
from report import Report

from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, make_document
from xkv_service.evaluation import Chat
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.reconstruct import rebuild


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load_model(arguments.model, device="cpu")
    report = Report("shorter_prefix", " ".join(["python", *sys.argv]), "the same tokens compressed alone")
    for times in (2, 4):
        for ratio in (8.0, 16.0):
            _measure(loaded, arguments, times, ratio, report)
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shorter_prefix.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--tokens", type=int, default=2048, help="length of the shorter document")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    return parser.parse_args()


def _measure(
    loaded: LoadedModel, arguments: argparse.Namespace, times: int, ratio: float, report: Report
) -> None:
    right = {"alone": 0, "longer": 0}
    errors: dict[str, list[float]] = {"alone": [], "longer": []}
    asked = 0
    # Without an index 16x can be reached; both ways then attend to every token.
    spec = CompressionSpec(ratio=ratio, index="sketch" if ratio < 10 else "none")
    for number in range(arguments.documents):
        short, ids, longer = _documents(loaded, arguments.tokens, times, number)
        questions = Random(number).sample(list(short.questions), arguments.questions)
        asked += len(questions)
        with torch.no_grad(), enable_xkv(loaded.model):
            whole = compress(loaded.model, longer, spec)
            alone = compress(loaded.model, ids, spec)
            caches = {
                "alone": XKVCache.from_factors(loaded.model, alone),
                "longer": XKVCache.from_factors(loaded.model, whole, tokens=len(ids)),
            }
            for name, cache in caches.items():
                chat = Chat(loaded.model, loaded.tokenizer, cache, ids.tolist(), short.text)
                for question in questions:
                    chat.restart()
                    reply = chat.ask(question.question, question.answer, enough=lambda text: True)
                    right[name] += reply.right is True
            exact = prefill(loaded.model, ids)
            for name, factors in (("alone", alone), ("longer", whole)):
                errors[name].append(_key_error(exact, factors))
    report.add(
        tokens=arguments.tokens,
        artifact_tokens=times * arguments.tokens,
        ratio=ratio,
        index=spec.index,
        questions=asked,
        **{f"{name}_right_%": 100 * count / asked for name, count in right.items()},
        **{f"{name}_key_error": sum(found) / len(found) for name, found in errors.items()},
    )


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
