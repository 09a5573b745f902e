"""Whether a server's answers are what the model says alone, greedily, with the cache that the server used."""

from __future__ import annotations

import math
import os
from typing import Any

from xkv_artifacts.store import ArtifactStore

TIE = 1e-3
"""Logits apart: a batch sums in another order than a single prompt, so either of two such tokens is right."""


def check(answers: list[Any], store: ArtifactStore) -> dict[str, Any]:
    """Answer every prompt again, alone, with the cache that the server said it used.

    Args:
        answers: each is told whether it is "right".
    """
    import torch
    from bundled import load

    from xkv_service import XKVCache, enable_xkv
    from xkv_service.sessions.context import Context
    from xkv_service.sessions.exact import empty_context

    loaded = load()
    torch.set_num_threads(os.cpu_count() or 1)
    contexts: dict[tuple[str | None, int], Context] = {}
    wrong, close, done = [], 0, {}
    with torch.no_grad(), enable_xkv(loaded.model):
        for answer in sorted(
            (one for one in answers if one["end"] == "answered"), key=lambda one: str(one["messages"])
        ):
            assert answer["xkv"].get("part") is None, (
                "answers from a part are not those of the whole artifact"
            )
            used = (answer["xkv"]["artifact"], answer["xkv"]["prefix_tokens"])
            prompt = loaded.tokenizer.apply_chat_template(
                answer["messages"], add_generation_prompt=True, return_dict=False
            )
            name = (used, tuple(prompt))
            if name not in done:
                if used not in contexts:
                    contexts[used] = (
                        empty_context(loaded.model)
                        if used[0] is None
                        else _context(XKVCache.from_artifact(loaded.model, store, used[0], tokens=used[1]))
                    )
                context = contexts[used].fork()
                done[name] = _alone(loaded, context, list(prompt))
                if used[0] is None:  # the next prompt is sorted behind it: often of the same document
                    contexts[used] = context
            margin = margin_where_they_part(*done[name], answer["text"])
            tie = margin is not None and margin < TIE
            close += tie
            answer["right"] = margin is None or tie
            if not answer["right"]:
                wrong.append({"text": answer["text"], "alone": done[name][0][-1], "margin": margin})
    for one in wrong[:5]:
        print("WRONG", one)
    return {
        "checked": sum(one["end"] == "answered" for one in answers),
        "wrong": len(wrong),
        "ties": close,
    }


def _context(cache: Any) -> Any:
    from xkv_service.sessions.context import Context

    return Context(cache.prefix.model, cache, cache.prefix.token_ids.tolist())


def margin_where_they_part(texts: list[str], margins: list[float], answer: str) -> float | None:
    """By how many logits the first token that the answer has not was the likeliest; None: they are the same.

    Args:
        texts: the greedy answer's text before each of its choices, and at last the whole.
        margins: of each choice, the one to end included where it was made.
    """
    if texts[-1] == answer:
        return None
    same = sum(answer.startswith(text) for text in texts)
    return margins[same - 1] if same <= len(margins) else math.inf


def _alone(loaded: Any, context: Any, prompt: list[int]) -> tuple[list[str], list[float]]:
    """The greedy answer's text before each choice and at last whole, and each choice's margin in logits."""
    from xkv_service.modeling.tokens import end_tokens
    from xkv_service.sessions.answer import common_tokens

    ends, chosen, margins = end_tokens(loaded.model, loaded.tokenizer), [], []
    context.rewind(min(common_tokens(context.ids, prompt), len(prompt) - 1))
    logits = context.advance(prompt[len(context.ids) :])
    while len(chosen) < 48:
        best = logits.topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        if token in ends:
            break
        chosen.append(token)
        logits = context.advance([token])
    parts = [loaded.tokenizer.decode(chosen[:n], skip_special_tokens=True) for n in range(len(chosen) + 1)]
    return parts, margins
