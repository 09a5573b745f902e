"""Why a stored prefix does not serve a prompt, in words for the client: never where the store is."""

from __future__ import annotations

from xkv_artifacts.errors import ArtifactNotFound, MissingBlob, XKVError
from xkv_service.engine.messages import Miss

NO_ARTIFACT = Miss("no_artifact", "no stored prefix begins like this prompt")
UNAVAILABLE = Miss("unavailable", "the store of prefixes does not answer")


def lost(artifact_id: str, error: XKVError) -> Miss:
    """Of an artifact that could not be read."""
    if isinstance(error, MissingBlob):
        return missing(artifact_id)
    if isinstance(error, ArtifactNotFound):
        return Miss("evicted", f"artifact {artifact_id[:12]} is gone from the store")
    return damaged(artifact_id)


def missing(artifact_id: str) -> Miss:
    """Of one whose blob is gone, though nobody deleted it."""
    return Miss("missing", f"the file of artifact {artifact_id[:12]} is gone from the store")


def damaged(artifact_id: str) -> Miss:
    """Of one whose blob is in quarantine."""
    return Miss("corrupt", f"artifact {artifact_id[:12]} is damaged")


def not_stored(prefix_id: str) -> Miss:
    """Of a named prefix that the namespace has not, whoever else has it."""
    return Miss("evicted", f"prefix {prefix_id[:12]} is not stored: removed, not ready, or never there")


def other_model(what: str, model: str) -> Miss:
    """Of one that fits, but for its fingerprint. `model` as in `ArtifactFacts`."""
    return Miss("other_model", f"{what} was made with another model ({model})")
