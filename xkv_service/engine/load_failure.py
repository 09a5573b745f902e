"""Why a prefix could not be had from its artifact: a value, since a request goes on without it."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Why there is no prefix.

    Args:
        detail: one line for clients.
        fault: the whole of it, one line for logs, which may say where the store is.
    """

    reason: MissReason
    detail: str
    fault: str = field(default="", compare=False)

    @property
    def lost(self) -> bool:
        """Whether the blob is damaged or missing, so that it must be made again."""
        return self.reason in ("corrupt", "missing")


_REASONS: tuple[tuple[tuple[type[BaseException], ...], MissReason, str], ...] = (
    ((MissingBlob,), "missing", "the file of artifact {} is gone from the store"),
    ((ArtifactNotFound,), "evicted", "artifact {} is gone from the store"),
    ((CorruptArtifact, MissingTensor), "corrupt", "artifact {} is damaged"),
    (
        (StoreError, CatalogUnavailable, CatalogError),
        "unavailable",
        "the store of prefixes does not answer",
    ),
    ((ModelMismatch, UnsupportedModel), "other_model", "artifact {} was made with another model"),
    # Written by a later version, or without the index that this server selects with: nothing it can use.
    (
        (UnsupportedFormat, InvalidSpec),
        "no_artifact",
        "artifact {} is of a format, or has an index, that this server cannot use",
    ),
    ((MemoryError, torch.OutOfMemoryError), "no_room", "there is no memory for artifact {} now"),
)
"""Kinds of errors, what they mean for a request, and what its client is told."""


def failure_of(error: Exception, artifact_id: str = "") -> LoadFailure:
    """What an error while loading an artifact means for the request; of an unknown one "unavailable"."""
    fault = error.message if isinstance(error, XKVError) else f"{type(error).__name__}: {first_line(error)}"
    for kinds, reason, words in _REASONS:
        if isinstance(error, kinds):
            return LoadFailure(reason, words.format(artifact_id[:12]), fault)
    return LoadFailure("unavailable", f"artifact {artifact_id[:12]} could not be loaded", fault)
