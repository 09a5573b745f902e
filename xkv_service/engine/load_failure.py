"""Why a prefix could not be had from its artifact: a value, since a request goes on without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    MissingBlob,
    MissingTensor,
    StoreError,
    UnsupportedFormat,
    XKVError,
    first_line,
)
from xkv_service.engine.messages import MissReason
from xkv_service.errors import InvalidSpec, ModelMismatch, UnsupportedModel


@dataclass(frozen=True)
class LoadFailure:
    """Why there is no prefix; `detail` is one line."""

    reason: MissReason
    detail: str

    @property
    def lost(self) -> bool:
        """Whether the blob is damaged or missing, so that it must be made again."""
        return self.reason in ("corrupt", "missing")


_REASONS: tuple[tuple[tuple[type[BaseException], ...], MissReason], ...] = (
    ((MissingBlob,), "missing"),
    ((ArtifactNotFound,), "evicted"),
    ((CorruptArtifact, MissingTensor), "corrupt"),
    ((StoreError, CatalogUnavailable, CatalogError), "unavailable"),
    ((ModelMismatch, UnsupportedModel), "other_model"),
    # Written by a later version, or without the index that this server selects with: nothing it can use.
    ((UnsupportedFormat, InvalidSpec), "no_artifact"),
    ((MemoryError, torch.OutOfMemoryError), "no_room"),
)


def failure_of(error: Exception) -> LoadFailure:
    """What an error while loading means for the request; of an unknown one "unavailable"."""
    detail = error.message if isinstance(error, XKVError) else f"{type(error).__name__}: {first_line(error)}"
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            return LoadFailure(reason, detail)
    return LoadFailure("unavailable", detail)
