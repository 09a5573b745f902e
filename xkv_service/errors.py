"""Errors of the method and of models, on the tree of `xkv_artifacts.errors`."""

from __future__ import annotations

from xkv_artifacts.errors import XKVError


class UnsupportedModel(XKVError):
    """A model whose cache this project cannot compress; the message gives the reason."""


class ModelNotFound(XKVError):
    """A model name or path that Transformers cannot load."""


class DeviceUnavailable(XKVError):
    """A device that is not on this machine."""


class InvalidSpec(XKVError):
    """A compression setting that is out of range; the message names the field, the value and the fix."""


class RatioUnreachable(InvalidSpec):
    """The target ratio leaves no byte for factors of this prefix."""


class PrefixTooShort(RatioUnreachable):
    """No ratio would: compressed, so short a prefix takes more bytes than its exact cache."""


class ModelMismatch(XKVError):
    """A model that is not the one an artifact was made with."""


class CacheMisuse(XKVError):
    """A call that a cache of factors cannot serve, found before any wrong token."""


class InvalidPrompt(XKVError):
    """A document or chat template that has no stable, non-empty token prefix, or does not fit the window."""


class Overloaded(XKVError):
    """More waits to be done than is taken on; the same may be asked again later."""


class MissingExtra(XKVError):
    """A package that comes with one of this project's extras is not installed; the hint names the extra."""

    def __init__(self, message: str, *, extra: str) -> None:
        super().__init__(message, hint=f"pip install 'xkv-service[{extra}]'")


__all__ = [
    "CacheMisuse",
    "DeviceUnavailable",
    "InvalidPrompt",
    "InvalidSpec",
    "ModelMismatch",
    "MissingExtra",
    "ModelNotFound",
    "Overloaded",
    "PrefixTooShort",
    "RatioUnreachable",
    "UnsupportedModel",
    "XKVError",
]
