"""Whether a server's answers are what the model says alone, greedily, with the cache that the server used."""

from __future__ import annotations

import os
from typing import Any

from xkv_artifacts.store import ArtifactStore


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
            text, margins = done[name]
            tie = text != answer["text"] and min(margins) < 1e-3
            close += tie
            answer["right"] = tie or text == answer["text"]
            if not answer["right"]:
                wrong.append({"text": answer["text"], "alone": text, "margin": min(margins)})
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


def _alone(loaded: Any, context: Any, prompt: list[int]) -> tuple[str, list[float]]:
    """The greedy answer, and by how much each of its tokens was the likeliest."""
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
    return loaded.tokenizer.decode(chosen, skip_special_tokens=True), margins
