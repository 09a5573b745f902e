"""`enable_xkv`: teach a model's attention to read caches of factors, and take it back afterwards.

A cache layer of factors returns the tail alone from `update`; the attention function registered here finds
that layer again through a variable of the thread and attends to its prefix as well. Layers of other caches,
and sliding or linear layers, run the model's own attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xkv_service.decoding.attention_call import AttendingLayer, AttentionCall
from xkv_service.decoding.call_checks import checked_calls
from xkv_service.decoding.scoring import Scoring
from xkv_service.errors import CacheMisuse, UnsupportedModel
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.observation import attention_implementation, base_function, switching

_NAME = "xkv_"
# Others leave causality to their kernels: without a mask the tokens of a prompt would see those behind them.
_MASKED = ("sdpa", "eager")
_LOCK = threading.Lock()
_ENABLED: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
_UNDO: WeakKeyDictionary[PreTrainedModel, ExitStack] = WeakKeyDictionary()
_THREAD = threading.local()


@contextmanager
def enable_xkv(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let `model` run over `XKVCache` inside the block; other caches work as before.

    May be nested, and used by several threads on one model. On exit of the last block the model is as it was.

    Raises:
        UnsupportedModel: the model's cache cannot be compressed, or its attention implementation is neither
            "sdpa" nor "eager".
    """
    inspect_loaded(model)
    with switching(model), _LOCK:
        if not is_enabled(model):
            _UNDO[model] = _install(model)
        _ENABLED[model] = _ENABLED.get(model, 0) + 1
    try:
        yield model
    finally:
        with switching(model), _LOCK:
            _ENABLED[model] -= 1
            if not is_enabled(model):
                _UNDO.pop(model).close()


def _install(model: PreTrainedModel) -> ExitStack:
    """Change the model once for all blocks, which may end in any order; closing takes it all back."""
    with ExitStack() as stack:
        implementation = attention_implementation(model)
        if not implementation.endswith(_MASKED):  # an observer's has a longer name
            raise UnsupportedModel(
                f"attention implementation {implementation!r} makes no mask that says what each token sees",
                hint='call model.set_attn_implementation("sdpa") first',
            )
        stack.callback(model.set_attn_implementation, implementation)
        model.set_attn_implementation(_register(implementation))
        stack.enter_context(checked_calls(model))
        inspected = inspect_loaded(model)
        for module in (*inspected.modules.values(), *inspected.windowed.values()):
            stack.callback(module.register_forward_pre_hook(_enter_module).remove)
            stack.callback(module.register_forward_hook(_leave_module).remove)
        return stack.pop_all()


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether `model` is inside `enable_xkv`."""
    return _ENABLED.get(model, 0) > 0


def attend_next(layer: AttendingLayer, module: nn.Module) -> None:
    """Have the attention of `module`, which is running on this thread, read the prefix of `layer`.

    Raises:
        CacheMisuse: another module is running, or one that is not inside `enable_xkv`.
    """
    if getattr(_THREAD, "module", None) is not module:
        raise CacheMisuse(
            f"layer {layer.index} of the cache was filled by one model and read by another",
            hint="make the cache with XKVCache.from_factors(model, ...) for the model that uses it",
        )
    _THREAD.layer = layer


def _enter_module(module: nn.Module, *_: Any) -> None:
    """A call that was interrupted may have left a layer that its attention never read."""
    _THREAD.layer, _THREAD.module = None, module


def _leave_module(*_: Any) -> None:
    layer = _take_layer()
    _THREAD.module = None
    if layer is not None:
        raise CacheMisuse(
            f"attention of layer {layer.index} did not read the prefix: its implementation was changed",
            hint="leave set_attn_implementation alone inside `with enable_xkv(model):`",
        )


def _take_layer() -> AttendingLayer | None:
    layer: AttendingLayer | None = getattr(_THREAD, "layer", None)
    _THREAD.layer = None
    return layer


def _register(base: str) -> str:
    """Register the attention over factors for models of implementation `base`; returns its name."""
    name = _NAME + base
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
        layer = _take_layer()
        if layer is None:
            return base_function(base, module)(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModel(f"{type(module).__name__} adds a position bias to its scores")
        scoring = Scoring(
            kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("s_aux")
        )
        plain = partial(base_function(base, module), module, **kwargs)
        return layer.attend(AttentionCall(query, key, value, attention_mask, scoring, plain)), None

    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name
