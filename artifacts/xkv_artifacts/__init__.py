"""Artifact formats, keys, blob store and catalog of xKV service. Knows no model, no Ray and no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xkv_artifacts.store import ArtifactStore

__all__ = ["ArtifactStore"]


def __getattr__(name: str) -> Any:
    """Load the store and what it needs only when it is asked for."""
    if name == "ArtifactStore":
        from xkv_artifacts.store import ArtifactStore

        return ArtifactStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
