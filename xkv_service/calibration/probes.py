"""Probes: tokens behind a prefix whose next-token distributions tell what an error in its cache does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from xkv_service.fidelity import held_back
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.prefilling.prefix_cache import StorageLayer


@dataclass(frozen=True)
class Probe:
    """Tokens that follow a prefix; the model's predictions at the last `counted` of them are compared."""

    token_ids: tuple[int, ...]
    counted: int

    @property
    def answer(self) -> tuple[int, ...]:
        """The known answer, at whose tokens and the one before predictions are compared; () of a text's own
        end."""
        return self.token_ids[1 - self.counted :] if 1 < self.counted < len(self.token_ids) else ()


@dataclass(frozen=True)
class ProbedPrefix:
    """One document of a sample: its prefix, and probes behind it.

    Without questions the document's own end is the probe, and the prefix what stands before it.
    """

    name: str
    token_ids: tuple[int, ...]
    probes: tuple[Probe, ...]

    @classmethod
    def of_text(cls, name: str, token_ids: Sequence[int]) -> ProbedPrefix:
        """A document without questions."""
        tail = max(1, held_back(len(token_ids)))
        return cls(name, tuple(token_ids[:-tail]), (Probe(tuple(token_ids[-tail:]), tail),))


@torch.no_grad()
def predictions(model: PreTrainedModel, cache: Cache, probes: Sequence[Probe]) -> torch.Tensor:
    """Logits [positions, vocabulary] of all probes, each behind the prefix that `cache` holds.

    Args:
        cache: an ordinary cache or one of factors; it is left as it was.
    """
    found = []
    for probe in probes:
        ids = torch.tensor([probe.token_ids], device=model.device)
        output: Any = model(ids, past_key_values=_fork(cache), logits_to_keep=probe.counted)
        found.append(output.logits[0])
    return torch.cat(found)


def right_answers(logits: torch.Tensor, probes: Sequence[Probe]) -> list[bool]:
    """Of each probe with a known answer, whether all of its tokens are the likeliest ones, the right tokens
    before each given.

    Args:
        logits: [positions, vocabulary], as `predictions` gives them.
    """
    said, position, found = logits.argmax(-1).tolist(), 0, []
    for probe in probes:
        if probe.answer:
            found.append(said[position : position + len(probe.answer)] == list(probe.answer))
        position += probe.counted
    return found


def exact_cache(
    exact: Prefill, changed: Mapping[tuple[int, str], torch.Tensor] | None = None
) -> DynamicCache:
    """An ordinary cache of the prefill.

    Args:
        changed: by (layer, "key" or "value"), what stands in for keys as cached (rotated) or values:
            [T, kv_heads, D].
    """
    cache = exact.cache()
    for (index, kind), states in (changed or {}).items():
        held, layer = cache.layers[index], DynamicLayer()
        other = states.to(held.keys.dtype).transpose(0, 1)[None]
        layer.update(other if kind == "key" else held.keys, other if kind == "value" else held.values)
        cache.layers[index] = layer
    return cache


def _fork(cache: Cache) -> Cache:
    """A cache that goes on by itself: layers that grow by making new tensors are shared."""
    fork = getattr(cache, "fork", None)
    if fork is not None:
        return fork()
    taken = copy.copy(cache)
    taken.layers = [
        copy.copy(layer) if type(layer) in (DynamicLayer, StorageLayer) else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return taken
