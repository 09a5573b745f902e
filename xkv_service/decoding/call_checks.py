"""Find calls that a cache of factors cannot serve before they give a wrong token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.errors import CacheMisuse, UnsupportedModel
from xkv_service.modeling.observation import bind_arguments
from xkv_service.modeling.rotary_source import frequency_change

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache


@contextmanager
def checked_calls(model: PreTrainedModel) -> Iterator[None]:
    """Check every call of `model` and of `model.generate` with an `XKVCache` inside the block."""
    handle = model.register_forward_pre_hook(_check_forward, with_kwargs=True)
    outer = model.__dict__.get("generate")
    model.generate = _checked_generate(model.generate)
    try:
        yield
    finally:
        handle.remove()
        if outer is None:
            del model.generate
        else:
            model.generate = outer


def _cache_of(arguments: dict[str, Any]) -> XKVCache | None:
    from xkv_service.decoding.cache import XKVCache

    cache = arguments.get("past_key_values")
    return cache if isinstance(cache, XKVCache) else None


def _check_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = bind_arguments(module, args, kwargs)
    cache = _cache_of(arguments)
    if cache is None:
        return
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if given is None:
        return
    _refuse_checkpointing(module)
    held, new = cache.get_seq_length(), given.shape[1]
    if new == 0:
        raise CacheMisuse(
            f"the call brings no token behind the {held} that are cached",
            hint="generate takes as many embeddings from the front as are cached: give all, or ids",
        )
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] != held + new:
        raise CacheMisuse(
            f"the attention mask has {mask.shape[1]} columns, but {held} tokens are cached and {new} are new",
            hint=f"give a mask of {held + new} columns: ones for the prefix, then the new tokens' own",
        )
    _refuse_crossing(module, held, new)
    cache.serve(given)


def _refuse_checkpointing(module: Any) -> None:
    """Transformers drops the cache then, and would answer without the prefix."""
    if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise CacheMisuse(
            "a model in training mode with gradient checkpointing does not use its cache",
            hint="call model.eval() first",
        )


def _refuse_crossing(module: Any, held: int, new: int) -> None:
    """Longrope chooses its frequencies by the length: keys of a short prefix do not fit a long one."""
    change = frequency_change(module.config)
    if change is not None and held <= change[1] < held + new:
        raise UnsupportedModel(
            f"{change[0]} rotary embeddings change at {change[1]} tokens: a shorter prefix cannot go past it",
            hint=f"stay within {change[1]} tokens, or compress a prefix that is longer than that",
        )


def _checked_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    def checked(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        cache = _cache_of(kwargs)
        if cache is not None:
            _check_assistance(cache.prefix.model.generation_config, kwargs, *args)
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if isinstance(ids, torch.Tensor) and kwargs.get("inputs_embeds") is None:
                _check_ids(cache, ids, kwargs.get("attention_mask"))
        return generate(inputs, *args, **kwargs)

    return checked


def _check_assistance(default: Any, kwargs: dict[str, Any], given: Any = None, *_: Any) -> None:
    """Assistance may be asked for in the call, in its generation config, and in the model's own."""
    configs = (kwargs.get("generation_config", given), default)
    asked = [kwargs.get("assistant_model")]
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        asked += [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
    if any(one is not None and one is not False for one in asked):
        raise CacheMisuse(
            "assisted generation and prompt lookup give wrong tokens over a cache that is already filled",
            hint="call generate without them",
        )


def _check_ids(cache: XKVCache, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Ids are those behind what the cache holds, with a mask over both, or all of them."""
    held, given = cache.get_seq_length(), ids.shape[1]
    covered = given if mask is None else mask.shape[1]
    if covered == held + given:
        return
    if covered != given:
        raise CacheMisuse(
            f"the attention mask has {covered} columns for {given} ids behind {held} cached tokens",
            hint=f"give a mask of {held + given} columns with these ids, or all {held} ids and the new ones",
        )
    if given <= held:
        seen = "without a mask" if mask is None else f"with a mask of {covered} columns"
        raise CacheMisuse(
            f"{given} ids were given {seen}, but the cache already holds {held} tokens",
            hint=f"give all ids from the prefix's first on, or an attention_mask of {held + given} columns",
        )
    _check_beginning(cache, ids[:, :held])


def _check_beginning(cache: XKVCache, ids: torch.Tensor) -> None:
    """All the ids that the cache should hold are those that it holds."""
    first = cache.prefix.token_ids.to(ids.device)
    if not bool((ids[:, : len(first)] == first).all()):
        raise CacheMisuse(
            "the ids do not begin with the tokens of the cached prefix",
            hint="render the same document, system prompt and template, or look up the artifact that fits",
        )
    departure = cache.tail_ids.departure(ids[:, len(first) :])
    if departure is not None:
        raise CacheMisuse(
            f"the ids differ from the cached tokens at position {len(first) + departure}",
            hint="crop the cache to what is common, or start from a new cache or a fork",
        )
