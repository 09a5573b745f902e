"""Exact match of the bundled model on its own documents: full cache, xKV and single-layer SVD at equal bytes.

python benchmarks/quality.py --out benchmarks/results/quality.json

Every method answers the same questions over a cache rebuilt densely from its factors (no selection). The
ratio counts everything stored; rows without index show what the ranks alone cost. An answer is right when
greedy decoding gives the expected text, character for character.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from bundled import LoadedModel, measure_of
from report import Report

from xkv_service import CompressionSpec
from xkv_service.compression import factorize_prefill
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, make_document
from xkv_service.errors import RatioUnreachable
from xkv_service.evaluation import Chat, ask_each
from xkv_service.modeling.models import load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import dense_cache

WEIGHTS = {
    "plain": ("none", "none"),
    "keys": ("query", "none"),
    "values": ("none", "output"),
    "both": ("query", "output"),
}


@dataclass
class Method:
    """One row: how a prefix is kept, and which of the questions it got right."""

    name: str
    spec: CompressionSpec | None
    right: list[bool] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    unreachable: str = ""


def methods(
    ratios: Sequence[float],
    indexes: Sequence[str],
    groups: Sequence[int],
    weights: Sequence[str],
    dtypes: Sequence[str],
    key_shares: Sequence[float] = (0.4,),
) -> list[Method]:
    """The full cache, then every combination of the arguments."""
    rows = [Method("full", None)]
    for ratio, index, dtype, group, name, share in product(
        ratios, indexes, dtypes, groups, weights, key_shares
    ):
        key_weights, value_weights = WEIGHTS[name]
        spec = CompressionSpec(
            ratio=ratio,
            group_size=group,
            index=index,
            factor_dtype=dtype,
            key_share=share,
            key_weights=key_weights,
            value_weights=value_weights,
        )
        rows.append(Method(f"{'svd' if group == 1 else f'xkv-{group}'} {name}", spec))
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model or demo_model_path(), device=arguments.device)
    rows = methods(
        arguments.ratios,
        arguments.indexes,
        arguments.groups,
        arguments.weights,
        arguments.dtypes,
        arguments.key_shares,
    )
    rng, asked = Random(arguments.seed), 0
    while asked < arguments.questions:
        document = make_document(rng, arguments.tokens, measure_of(loaded))
        asked += _examine(loaded, document, rows, arguments.per_document)
        print(f"{asked} questions: " + ", ".join(f"{sum(row.right)}" for row in rows), flush=True)
    report = Report("quality", " ".join(["python", *sys.argv]), "exact match with the full cache")
    for row in rows:
        report.add(**_summary(row, rows[0]))
    report.write(arguments.out, model=arguments.model or "bundled", tokens=arguments.tokens)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--model", help="by default the bundled one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="more cost time in a model this small")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per document")
    parser.add_argument("--questions", type=int, default=500, help="at least so many")
    parser.add_argument("--per-document", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4.0, 8.0, 16.0, 24.0])
    parser.add_argument(
        "--indexes", nargs="+", default=["none", "sketch"], choices=["none", "sketch", "landmark"]
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["int8"], choices=["int8", "bfloat16"])
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--key-shares", type=float, nargs="+", default=[0.4], help="of a group's ranks")
    return parser.parse_args()


def _examine(loaded: LoadedModel, document: Document, rows: list[Method], most: int) -> int:
    """Ask every method up to `most` questions about a document; returns how many."""
    ids = render_prefix(loaded.tokenizer, document.text)
    questions = [(one.question, one.answer) for one in document.questions[:most]]
    exact = prefill(loaded.model, ids)
    for row in rows:
        if row.unreachable:
            continue
        if row.spec is None:
            cache = exact.cache()
        else:
            try:
                factors, _ = factorize_prefill(loaded.model, exact, row.spec)
            except RatioUnreachable as error:
                row.unreachable = str(error)
                continue
            row.ratios.append(factors.bytes_full / factors.nbytes)
            cache = dense_cache(loaded.model, factors)
        # No tokens for a free answer: the check against the expected one decides.
        chat = Chat(loaded.model, loaded.tokenizer, cache, ids, document.text, max_new_tokens=0)
        row.right += [reply.right is True for reply in ask_each(chat, questions)]
    exact.free()
    return len(questions)


def _summary(row: Method, full: Method) -> dict[str, Any]:
    if row.unreachable or not row.right:
        return {
            "method": row.name,
            "target": row.spec and row.spec.ratio,
            "index": row.spec and row.spec.index,
            "factors": row.spec and row.spec.factor_dtype,
            "note": row.unreachable,
        }
    share, count = sum(row.right) / len(row.right), len(row.right)
    lost = sum(a and not b for a, b in zip(full.right, row.right, strict=True))
    gained = sum(b and not a for a, b in zip(full.right, row.right, strict=True))
    return {
        "method": row.name,
        "target": row.spec.ratio if row.spec else 1.0,
        "index": row.spec.index if row.spec else "",
        "factors": row.spec.factor_dtype if row.spec else "",
        "key_share": row.spec.key_share if row.spec else None,
        "ratio": sum(row.ratios) / len(row.ratios) if row.ratios else 1.0,
        "exact_match": share,
        "standard_error": (share * (1 - share) / count) ** 0.5,
        "questions": count,
        "lost": lost,
        "gained": gained,
    }


if __name__ == "__main__":
    main()
