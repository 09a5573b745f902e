"""A stored tail in the catalog: what Redis says about it. Good for finding it, never for correctness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from xkv_artifacts.entry import HashEntry
from xkv_artifacts.manifest import Namespace, Sha256


class TailEntry(HashEntry):
    """One stored tail in the catalog.

    Args:
        bytes: size of the blob.
        fingerprint: of the model. namespace: whose conversation it is.
        artifact: whose factors the prefix is; None: the tail is all of the conversation.
        tokens: of the conversation, and how many of them are the prefix: `prefix_tokens`.
        last_used: seconds since the epoch.
    """

    score: ClassVar[str] = "last_used"

    bytes: int = Field(ge=1)
    fingerprint: Sha256
    namespace: Namespace
    artifact: Sha256 | None = None
    tokens: int = Field(ge=1)
    prefix_tokens: int = Field(ge=0)
    last_used: float


@dataclass(frozen=True)
class TailMatch:
    """A stored tail, and how many of a prompt's first tokens it holds, as far as the catalog says."""

    entry: TailEntry
    shared: int

    @property
    def id(self) -> str:
        """The tail's."""
        return self.entry.id

    @property
    def whole(self) -> bool:
        """Whether the prompt goes on from the tail's end."""
        return self.shared == self.entry.tokens
