"""Watch an ordinary model's attention while it runs, and leave no trace afterwards.

Queries are seen through an attention function registered with Transformers that delegates to the model's own;
cos and sin through forward pre-hooks on the attention modules. Both live only inside `observe`.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "xkv_observe_"


class AttentionObserver(Protocol):
    """What an observer is told. Calls come in the order the model runs, on the model's device."""

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        """The rotated query [batch, heads, t, D] that `module` attends with."""

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """The arguments by name that the attention module `module` was called with."""


@dataclass(frozen=True)
class _Active:
    observer: AttentionObserver
    fused_chunks: bool


_SWITCHING_LOCK = threading.Lock()
_SWITCHING: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_ACTIVE: ContextVar[_Active | None] = ContextVar("xkv_attention_observer", default=None)


@contextmanager
def observe(
    model: PreTrainedModel,
    observer: AttentionObserver,
    modules: list[nn.Module],
    *,
    fused_chunks: bool = False,
) -> Iterator[None]:
    """Let `observer` see the model's attention; hooks and attention function are restored on exit.

    Args:
        model: any model whose attention goes through Transformers' attention interface.
        observer: told about the queries of every layer and the inputs of `modules`.
        modules: attention modules to watch the inputs of.
        fused_chunks: let chunks behind the first use a fused causal kernel instead of a [t, T] mask. Only for
            right-padded input on CUDA in half precision, keys and values of one width up to 256.
    """
    with switching(model):
        yield from _observed(model, observer, modules, fused_chunks)


def switching(model: PreTrainedModel) -> threading.RLock:
    """Held while the attention implementation of `model` is changed or must not change.

    Each thread puts back what it found: two at a time would put back each other's.
    """
    with _SWITCHING_LOCK:
        return _SWITCHING.setdefault(model, threading.RLock())


def _observed(
    model: PreTrainedModel, observer: AttentionObserver, modules: list[nn.Module], fused_chunks: bool
) -> Iterator[None]:
    original = attention_implementation(model)
    handles: list[Any] = []
    token = _ACTIVE.set(_Active(observer, fused_chunks))
    was_training = model.training
    try:
        model.eval()
        for module in modules:
            handles.append(_watch_input(module, observer))
        model.set_attn_implementation(_register(original))
        yield
    finally:
        model.set_attn_implementation(original)
        for handle in handles:
            handle.remove()
        model.train(was_training)
        _ACTIVE.reset(token)


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention implementation of the model's decoder ("sdpa", "eager", ...)."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `module.forward` by name, `**kwargs` merged in."""
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def _watch_input(module: nn.Module, observer: AttentionObserver) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer.on_attention_input(module, bind_arguments(module, args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _register(base: str) -> str:
    """Register the observing twin of attention implementation `base`; returns its name."""
    name = _PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        active = _ACTIVE.get()
        if active is not None:
            active.observer.on_query(module, query)
            if active.fused_chunks and base == "sdpa" and _is_later_chunk(query, key, attention_mask):
                return _lower_right_attention(query, key, value, kwargs.get("scaling"))
        return base_function(base, module)(module, query, key, value, attention_mask, **kwargs)

    base_mask = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def mask(**kwargs: Any) -> Any:
        active = _ACTIVE.get()
        if active is not None and active.fused_chunks and base == "sdpa" and _is_plain_causal(kwargs):
            return None
        return base_mask(**kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name


def base_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function `module` would have called under implementation `base`."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise LookupError(f"{type(module).__name__} has no eager attention function")


def _is_plain_causal(mask_arguments: dict[str, Any]) -> bool:
    """Whether a mask only says "causal", so that a kernel can do without it."""
    unpadded = mask_arguments.get("attention_mask") is None
    return unpadded and mask_arguments.get("mask_function") is causal_mask_function


def _is_later_chunk(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return mask is None and 1 < query.shape[2] < key.shape[2]


def _lower_right_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, None]:
    """Causal attention of a later chunk: the last query sees every key. No [t, T] mask is made."""
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None
