"""Every method by name, and how a text such as `xkv:group=4,ratio=8` becomes one.

To add a method: one file with a class of the `Method` interface, and one line in `METHODS`. The options of a
method are the keyword arguments of its class, annotated with int, float, str, bool, a `Literal` of texts, or
one of them `| None`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.base import Method
from xkv_service.evaluation.methods.full import Full
from xkv_service.evaluation.methods.minicache import MiniCache
from xkv_service.evaluation.methods.quantized import Quantized
from xkv_service.evaluation.methods.snapkv import SnapKV
from xkv_service.evaluation.methods.xkv import XKV

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "minicache": MiniCache,
    "quantized": Quantized,
    "snapkv": SnapKV,
    "xkv": XKV,
}


def make_methods(texts: Sequence[str]) -> dict[str, Method]:
    """Methods by the text that asked for them, in the order given.

    Raises:
        InvalidSpec: an unknown method or option, a value out of range, or a text twice.
    """
    methods: dict[str, Method] = {}
    for text in texts:
        if text in methods:
            raise InvalidSpec(f"method {text!r} is there twice", hint="name each method once")
        methods[text] = make_method(text)
    return methods


def make_method(text: str) -> Method:
    """The method that `name` or `name:option=value,option=value` asks for.

    Raises:
        InvalidSpec: an unknown method or option, or a value out of range.
    """
    name, _, options = text.partition(":")
    if name not in METHODS:
        raise InvalidSpec(f"method {name!r} is unknown", hint=f"use one of {', '.join(sorted(METHODS))}")
    kinds = _options_of(METHODS[name])
    values: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        option, equals, value = part.partition("=")
        if option not in kinds or not equals or option in values:
            known = ", ".join(f"{known}=..." for known in kinds) or "no options"
            raise InvalidSpec(f"method {text!r}: {part!r} is not an option", hint=f"{name} takes {known}")
        values[option] = _value(text, option, value, kinds[option])
    return METHODS[name](**values)


def _options_of(factory: Callable[..., Method]) -> dict[str, Any]:
    """Names and annotated types of a class's keyword arguments."""
    hints = get_type_hints(factory.__init__) if inspect.isclass(factory) else get_type_hints(factory)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(factory).parameters.values()
    return {parameter.name: hints[parameter.name] for parameter in found if parameter.kind in kinds}


def _value(text: str, option: str, value: str, kind: Any) -> Any:
    for one in get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,):
        try:
            return _convert(value, one)
        except ValueError:
            continue
    raise InvalidSpec(f"method {text!r}: {value!r} is no value of {option}", hint=f"use {_wanted(kind)}")


def _convert(value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif kind is type(None):
        if value == "none":
            return None
    elif kind is bool:
        if value in ("true", "false"):
            return value == "true"
    elif kind in (int, float, str):
        return kind(value)
    raise ValueError(value)


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_args(kind):
        return " or ".join(_wanted(one) for one in get_args(kind))
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "none"}
    return names.get(kind, str(kind))
