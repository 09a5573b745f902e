"""The xKV method: compress the KV cache of a long shared prefix and decode from the factors.

from xkv_service import ChatRenderer, CompressionSpec, compress
input_ids = ChatRenderer(tokenizer, document=text).prefix_ids()
factors = compress(model, input_ids, CompressionSpec(ratio=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec

if TYPE_CHECKING:
    from xkv_service.compression import compress
    from xkv_service.decoding.cache import XKVCache
    from xkv_service.decoding.xkv_attention import enable_xkv
    from xkv_service.factors import PrefixFactors
    from xkv_service.sessions.rendering import ChatRenderer
    from xkv_service.sessions.session import Session

__all__ = [
    "ChatRenderer",
    "CompressionSpec",
    "PrefixFactors",
    "SelectionSpec",
    "Session",
    "XKVCache",
    "compress",
    "enable_xkv",
]

_LAZY = {
    "ChatRenderer": "xkv_service.sessions.rendering",
    "compress": "xkv_service.compression",
    "PrefixFactors": "xkv_service.factors",
    "Session": "xkv_service.sessions.session",
    "XKVCache": "xkv_service.decoding.cache",
    "enable_xkv": "xkv_service.decoding.xkv_attention",
}


def __getattr__(name: str) -> Any:
    """Load what needs torch only when it is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
