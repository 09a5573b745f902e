"""Errors of the pipeline, on the tree of `xkv_artifacts.errors`."""

from __future__ import annotations

from xkv_artifacts.errors import XKVError


class BadDocument(XKVError):
    """One document that cannot be read; the others go on."""


class CorpusError(XKVError):
    """A corpus that cannot be read at all: no such path, or nothing in it."""


class RayUnavailable(XKVError):
    """Ray cannot be started or reached, or it has no room for a worker."""


class WorkerFailed(XKVError):
    """The workers cannot do their work: the model does not load there, or they keep dying."""


class FidelityTooLow(XKVError):
    """The compressed prefix agrees with the exact cache less than `--min-fidelity` asks for."""


class CalibrationNeeded(XKVError):
    """A calibration that artifacts in the store cannot be used without."""


class ServerFailed(XKVError):
    """The server does not come up, or ends by itself."""


class TakenDown(ServerFailed):
    """Somebody else has taken the server off Serve."""


def one_line(error: BaseException) -> str:
    """The type and message of an error that somebody else's code raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


__all__ = [
    "BadDocument",
    "CalibrationNeeded",
    "CorpusError",
    "FidelityTooLow",
    "RayUnavailable",
    "ServerFailed",
    "WorkerFailed",
    "XKVError",
    "one_line",
]
