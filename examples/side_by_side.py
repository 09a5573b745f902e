"""Ask about a document twice: over the exact KV cache, and straight from the factors that are stored.

xkv precompute --docs examples/corpus --ratio 20 --store .demo/store
python examples/side_by_side.py --store .demo/store
python examples/side_by_side.py --store .demo/store --document examples/corpus/NAME.md --question "..."
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

from xkv_artifacts.errors import ArtifactNotFound, XKVError
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import XKVCache, enable_xkv
from xkv_service.decoding.loading import load_factors
from xkv_service.demo import demo_model_path
from xkv_service.evaluation import Chat
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "corpus" / "guide-cork-ivory-gull-union.md"
QUESTIONS = 3


def main() -> None:
    """Load, ask, show."""
    options = _options()
    text = options.document.read_text("utf-8")
    loaded = load_model(options.model)
    prefix = render_prefix(loaded.tokenizer, text)
    manifest, factors = _stored(options.store, loaded, prefix)

    started = time.perf_counter()
    exact = _exact_cache(loaded, prefix)
    prefill_seconds = time.perf_counter() - started
    started = time.perf_counter()
    manifest, factors = _stored(options.store, loaded, prefix)
    cache = XKVCache.from_factors(loaded.model, factors, tokens=len(prefix))
    load_seconds = time.perf_counter() - started

    table = Table("", "exact cache", "stored factors, decoded from directly")
    with enable_xkv(loaded.model):
        for question, expected in options.questions:
            answers = []
            for held in (exact, cache):
                chat = Chat(loaded.model, loaded.tokenizer, held, prefix, text, max_new_tokens=64)
                answers.append(_answer(chat.ask(question).text, expected))
                chat.restart()
            table.add_row(Text(question), *answers, end_section=True)
    table.add_row(
        "size as stored",
        _mib(manifest.bytes_full),
        f"{_mib(factors.nbytes)}, {_less(manifest, factors)} less",
    )
    table.add_row("made ready in", f"{prefill_seconds:.2f} s (prefill)", f"{load_seconds:.2f} s (load)")
    table.add_row("rebuilt for each token", "", f"{cache.rebuilt_tokens:,.0f} of {manifest.tokens:,} tokens")
    console = Console(highlight=False)
    console.print(f"\n{options.document.name}, {manifest.tokens:,} tokens")
    console.print(table)


def _stored(store_url: str, loaded: LoadedModel, prefix: list[int]) -> tuple[PrefixManifest, PrefixFactors]:
    """The artifact that holds the prefix, every byte checked."""
    with ArtifactStore.open(store_url, create=False) as store:
        match = store.lookup(loaded.identity.fingerprint, "default", prefix)
        if match is None or match.tokens < len(prefix):
            raise ArtifactNotFound("this document is not in the store", hint="run xkv precompute on it first")
        return store.manifest(match.artifact_id), load_factors(store, match.artifact_id)


def _exact_cache(loaded: LoadedModel, prefix: list[int]) -> DynamicCache:
    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model(
            torch.tensor([prefix], device=loaded.model.device), past_key_values=cache, logits_to_keep=1
        )
    return cache


def _answer(text: str, expected: str | None) -> Text:
    if expected is None:
        return Text(text)
    return Text(text, "green" if text.strip() == expected.strip() else "red")


def _less(manifest: PrefixManifest, factors: PrefixFactors) -> str:
    return f"{manifest.bytes_full / factors.nbytes:.1f}x"


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="where xkv precompute put the artifacts")
    parser.add_argument("--model", default=str(demo_model_path()), help="default: the bundled model")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--question", help="default: three questions whose answers are known")
    options = parser.parse_args()
    options.questions = [(options.question, None)] if options.question else _known_questions(options.document)
    return options


def _known_questions(document: Path) -> list[tuple[str, str]]:
    path = HERE / "questions" / f"{document.stem}.questions.jsonl"
    lines = path.read_text("utf-8").splitlines()[:QUESTIONS]
    return [(record["question"], record["answer"]) for record in map(json.loads, lines)]


if __name__ == "__main__":
    try:
        main()
    except XKVError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
