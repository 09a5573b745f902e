"""The one tree of errors a user can meet. Each message names what was wrong; `hint` says what to do."""

from __future__ import annotations


class XKVError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: one line that names what was wrong.
        hint: one line that says what to do about it, or "".
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[XKVError], message: str, hint: str) -> XKVError:
    """Make the error again in another process (errors cross Ray's process boundary)."""
    error = kind.__new__(kind)
    XKVError.__init__(error, message, hint=hint)
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message: other packages' go on for paragraphs."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class StoreError(XKVError):
    """The blob store cannot be read or written (permissions, space, bad URL)."""


class ArtifactNotFound(XKVError):
    """No artifact of that id is in the store."""


class MissingBlob(ArtifactNotFound):
    """The catalog lists an artifact whose blob is gone from the store, and nobody deleted it."""


class ForeignTail(ArtifactNotFound):
    """What is stored under a tail's name is no tail of this model, namespace or conversation."""


class CorruptArtifact(XKVError):
    """A blob's bytes are not what was written: truncated, changed, or never a valid artifact."""


class UnsupportedFormat(XKVError):
    """A blob is of a format or version this code does not read."""


class CatalogUnavailable(XKVError):
    """Redis does not answer."""


class CatalogError(XKVError):
    """Redis answered something that is not a catalog entry."""


class QuotaExceeded(XKVError):
    """An artifact does not fit into what its namespace may hold, and what is there cannot be collected."""


class InvalidLimits(XKVError):
    """Limits, sizes or times that are none."""


class InvalidCursor(XKVError):
    """A place in a listing that no earlier page gave."""


class InvalidNamespace(XKVError):
    """A namespace with characters outside letters, digits, dot, dash and underscore."""


class InvalidKey(XKVError):
    """Token ids or a compression spec that an artifact id cannot be made from."""


class ModelFilesError(XKVError):
    """A model folder that cannot be fingerprinted: missing, unreadable, or without config or weights."""


class MissingTensor(XKVError):
    """A tensor that a reader asks for is not in the artifact."""
