"""hqq, imported when a quantized cache is made and not whenever Transformers is.

Where hqq is installed, `transformers.cache_utils` imports its quantizer, and that half of PyTorch's compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_NAME = "hqq.core.quantize"


def put_off_hqq() -> None:
    """Have the first use of hqq's quantizer import it. For the start of a process, before Transformers is
    imported; without hqq, or when it is imported already, nothing happens."""
    if _NAME not in sys.modules and find_spec("hqq") is not None:
        sys.modules[_NAME] = _Later(_NAME)


class _Later(ModuleType):
    """Stands for the module until something of it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.Quantizer = _LaterQuantizer()  # Transformers takes it when it is imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules is not a user
            raise AttributeError(name)
        return getattr(_quantize(), name)


class _LaterQuantizer:
    """Stands for hqq's class of functions."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_quantize().Quantizer, name)


def _quantize() -> ModuleType:
    if isinstance(sys.modules.get(_NAME), _Later):
        del sys.modules[_NAME]
    return import_module(_NAME)
