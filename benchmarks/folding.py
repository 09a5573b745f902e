"""A conversation of 50 turns whose tail is folded into factors: answers by turn and bytes of the session.

python benchmarks/folding.py --out benchmarks/results/folding.json

Every question is new, about one document of 4,096 tokens at 8x; the model's own answers stay in context.
Folding begins when the exact tail passes 512 tokens and leaves the last 64 exact. Exact keys and values count
at 16 bits a number, whatever the machine computes in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from bundled import measure_of
from report import Report, command, measured_on

from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.folded_prefix import folded_bytes
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import make_document
from xkv_service.evaluation import Chat
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix

TURNS = 50
AFTER, KEEP = 512, 64
ERRORS = (None, 0.02, 0.05, 0.1, 0.2, 0.4)


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
        found = [row for number in numbers for row in _conversations(loaded, arguments.tokens, number)]
    report = Report("folding", command(arguments.merge), "the same conversation with an exact tail")
    exact = [row["session_bytes"] for row in found if row["error"] is None]
    for error in ERRORS:
        rows = [row for row in found if row["error"] == error]
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "error"}
        ratio = sum(exact) / sum(row["session_bytes"] for row in rows)
        report.add(error=error or "exact tail", conversations=len(rows), **mean, bytes_ratio=ratio)
    report.write(arguments.out, found=found, **measured_on(arguments.merge))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/folding.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8, help="conversations")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th conversation")
    parser.add_argument("--merge", type=Path, nargs="+", help="parts to add up instead of measuring")
    return parser.parse_args()


def _conversations(loaded: LoadedModel, tokens: int, number: int) -> list[dict[str, Any]]:
    document = make_document(Random(f"folding {number}"), tokens, measure_of(loaded))
    ids = torch.tensor(render_prefix(loaded.tokenizer, document.text))
    questions = Random(number).sample(list(document.questions), TURNS)
    with torch.no_grad(), enable_xkv(loaded.model):
        factors = compress(loaded.model, ids, CompressionSpec(ratio=8))
        found = []
        for error in ERRORS:
            chat = _chat(loaded, factors, ids, document.text)
            right = []
            for question in questions:
                right.append(chat.ask(question.question, question.answer).right is True)
                _fold(chat, error)
            found.append({"error": error, **_row(right, chat.greedy.cache)})
    return found


def _chat(loaded: LoadedModel, factors: PrefixFactors, ids: torch.Tensor, text: str) -> Chat:
    cache = XKVCache.from_factors(loaded.model, factors)
    return Chat(loaded.model, loaded.tokenizer, cache, ids.tolist(), text, max_new_tokens=100)


def _fold(chat: Chat, error: float | None) -> None:
    if error is not None and chat.greedy.cache.tail_tokens > AFTER:
        chat.greedy.cache.fold(keep=KEEP, error=error)


def _row(right: list[bool], cache: XKVCache) -> dict[str, float]:
    third = TURNS // 3
    return {
        "right_%": 100 * sum(right) / TURNS,
        "first_third_%": 100 * sum(right[:third]) / third,
        "last_third_%": 100 * sum(right[-third:]) / third,
        "tail_tokens": cache.tail_tokens,
        "folded_tokens": cache.folded_tokens,
        "session_bytes": _bytes(cache),
    }


def _bytes(cache: XKVCache) -> int:
    """Bytes of a session, exact numbers at 16 bits."""
    layers = [layer for layer in cache.layers if isinstance(layer, PrefixLayer)]
    exact = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    return 2 * exact + folded_bytes(layer.selection.prefix for layer in layers)


if __name__ == "__main__":
    main()
