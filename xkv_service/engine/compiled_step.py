"""Norms and rotary embedding of a decode step, compiled: what takes many kernels then takes one or two.

The model keeps its code. Compiled functions stand in its place only inside `in_place`, and only for the
thread there: others run the model meanwhile.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from xkv_service.kernels.probe import no_memory
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.joined_products import difference, few_logits, tolerance
from xkv_service.modeling.observation import switching

_log = logging.getLogger(__name__)
_LOCK = threading.Lock()
"""Held while functions are in place: models of one class share the rotary embedding."""
_ROTARY = "apply_rotary_pos_emb"
_NORMS = ("RMSNorm", "LayerNorm")
"""Ends of their classes' names."""

_Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Site:
    """A function that is looked up by name, and what may stand in its place.

    Args:
        names: where it is put: attributes of a module of the model, or globals of the model's code.
        own: the model's own function. compiled: of the same arguments and result.
    """

    names: dict[str, Any]
    name: str
    own: _Function
    compiled: _Function


class CompiledStep:
    """What is compiled of a model's forward.

    Compiled when it is made, and held against the model's own code in four forwards over a few tokens.
    Whatever fails, then or later, is logged once; from then on all runs as the model has it.

    Args:
        model: that nobody else runs meanwhile.
        on: whether anything is compiled at all.
    """

    def __init__(self, model: PreTrainedModel, *, on: bool) -> None:
        self._sites: list[_Site] = []
        if on:
            try:
                with _LOCK:  # nothing of another model stands in the place of what is found
                    self._sites = [*_rotary(model), *_norms(model)]
                self._try(model)
            except Exception as error:  # noqa: BLE001 - whatever a compiler may raise
                self._turn_off(error)

    @property
    def on(self) -> bool:
        """Whether anything stands in the model's place."""
        return bool(self._sites)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """This thread runs what is compiled, all others the model's own code."""
        if not self._sites:
            yield
            return
        with _LOCK:
            sites = self._sites
            before = [site.names.get(site.name) for site in sites]
            try:
                for site in sites:
                    site.names[site.name] = self._either(site)
                yield
            finally:
                for site, function in zip(sites, before, strict=True):
                    if function is None:
                        del site.names[site.name]
                    else:
                        site.names[site.name] = function

    def _either(self, site: _Site) -> _Function:
        thread = threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and self._sites:
                try:
                    return site.compiled(*args, **kwargs)
                except Exception as error:  # other shapes are compiled anew
                    if no_memory(error):
                        raise
                    self._turn_off(error)
            return site.own(*args, **kwargs)

        return call

    def _turn_off(self, error: object) -> None:
        self._sites = []
        _log.warning("decode steps run uncompiled: %s", str(error).strip().split("\n")[0])

    def _try(self, model: PreTrainedModel) -> None:
        """Compile for one token and for any number, and compare logits."""
        with switching(model), torch.no_grad():
            for tokens in (_some(model), 1):
                before = few_logits(model, tokens)
                with self.in_place():
                    after = few_logits(model, tokens)
                if not difference(before, after) <= tolerance(model.dtype):  # neither is nan
                    raise ArithmeticError(f"logits differ by {difference(before, after):.3g}")


def _some(model: PreTrainedModel) -> int:
    """Tokens of a forward that is compiled for any number: what has the size of another dimension is taken
    for it.
    """
    layers = inspect_loaded(model).layout.layers
    sizes = {size for one in layers for size in (one.query_heads, one.kv_heads, one.head_dim, one.value_dim)}
    return next(tokens for tokens in itertools.count(5) if tokens not in sizes)


def _rotary(model: PreTrainedModel) -> list[_Site]:
    """The rotary embedding among the globals of the model's attention."""
    inspected = inspect_loaded(model)
    modules = [*inspected.modules.values(), *inspected.windowed.values()]
    found = [inspect.unwrap(type(one).forward).__globals__ for one in modules]
    places = {id(names): names for names in found if _ROTARY in names}
    return [_Site(names, _ROTARY, names[_ROTARY], _compiled(names[_ROTARY])) for names in places.values()]


def _norms(model: PreTrainedModel) -> list[_Site]:
    return [
        _Site(vars(one), "forward", one.forward, partial(_compiled(type(one).forward), one))
        for one in model.modules()
        if type(one).__name__.endswith(_NORMS) and "forward" not in vars(one)
    ]


@cache
def _compiled(function: _Function) -> _Function:
    """For any number of tokens; modules of one class share it."""
    return torch.compile(function, dynamic=True, fullgraph=True)
