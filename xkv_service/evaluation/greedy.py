"""Greedy decoding on a cache that already holds the beginning of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from xkv_service.sessions.answer import common_tokens


class Greedy:
    """The likeliest tokens behind a prefix, computed on a cache that holds it.

    Args:
        model: in evaluation mode; the cache is on its device.
        cache: holds the prefix and nothing else; grows with what is run.
        prefix_ids: the tokens in the cache.
        fresh: makes another cache that holds the prefix, to start over from where tokens would have to be
            removed; without it the cache is cropped, which not every cache can be.

    Attributes:
        held: the tokens in the cache now.
        ends: tokens that end a reply.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        prefix_ids: Sequence[int],
        fresh: Callable[[], Cache] | None = None,
    ) -> None:
        self.model, self.cache, self.fresh = model, cache, fresh
        self.prefix = list(prefix_ids)
        self.held = list(prefix_ids)
        self.ends = _end_ids(model)

    def confirms(self, prompt: list[int], reply: list[int], *, ended: bool) -> bool:
        """Whether greedy decoding behind `prompt` gives `reply`, checked in one pass.

        It does when each token is the likeliest after those before it. The cache then holds both.

        Args:
            ended: whether one of the ending tokens must follow.
        """
        likeliest = self.run(prompt + reply, len(reply) + 1).argmax(-1).tolist()
        if likeliest[:-1] != reply or self.ends.intersection(reply):
            return False
        return not ended or likeliest[-1] in self.ends

    def tokens(self, prompt: list[int]) -> Iterator[int]:
        """The likeliest tokens behind `prompt`, one after the other, up to one that ends the reply."""
        ids = list(prompt)
        while (token := int(self.run(ids, 1)[-1].argmax())) not in self.ends:
            yield token
            ids.append(token)

    def run(self, ids: list[int], positions: int) -> torch.Tensor:
        """Logits [positions, vocabulary] behind the last tokens of `ids`; computes what the cache lacks."""
        self.keep(min(common_tokens(self.held, ids), len(ids) - positions))
        new = torch.tensor([ids[len(self.held) :]], device=self.model.device)
        with torch.no_grad():
            output: Any = self.model(new, past_key_values=self.cache, logits_to_keep=positions)
        self.held = list(ids)
        logits: torch.Tensor = output.logits[0]
        return logits

    def keep(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; with `fresh`, all behind the prefix."""
        if len(self.held) <= tokens:
            return
        if self.fresh is not None:
            self.cache, self.held = self.fresh(), list(self.prefix)
            return
        self.cache.crop(tokens - len(self.held))
        del self.held[tokens:]


def decode(
    tokens: Iterator[int],
    text_of: Callable[[list[int]], str],
    most: int,
    enough: Callable[[str], bool] = lambda text: False,
) -> str:
    """The text of up to `most` tokens, cut short as soon as it is `enough`."""
    said: list[int] = []
    text = ""
    while len(said) < most and not enough(text):
        token = next(tokens, None)
        if token is None:
            break
        said.append(token)
        text = text_of(said)
    return text


def _end_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
