"""`Source`: what a session's prefix was made from."""

from __future__ import annotations

from dataclasses import dataclass

from xkv_artifacts.manifest import ModelIdentity


@dataclass(frozen=True)
class Source:
    """What a saved session is held against when it is loaded.

    Args:
        model: whose cache it is.
        artifact_id: the artifact that holds the prefix; None: the prefix is exact, and computed again.
    """

    model: ModelIdentity
    artifact_id: str | None = None
