"""Everything that crosses a process boundary, as plain frozen values."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from xkv_artifacts.manifest import DocumentRef
from xkv_service.spec import CompressionSpec

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ModelPlace:
    """What a worker needs to know to load the model and open the store.

    Args:
        model, revision: an absolute folder or a name on the hub; each worker loads it by itself.
        dtype: what it runs in.
        fingerprint: of the model the driver planned with; a worker that loads another one refuses to work.
        device: where the model runs. threads: CPU threads for torch.
        store_url, redis_url: where blobs and catalog entries go.
    """

    model: str
    revision: str | None
    dtype: str
    fingerprint: str
    device: Device
    threads: int
    store_url: str
    redis_url: str


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know before its first document.

    Args:
        namespace, spec: of every artifact of the run.
        min_fidelity: artifacts below are not published; 0 publishes all.
        retries: what is tried for an artifact of low fidelity; nothing: it is not compressed again.
        refuse_low: artifacts of low fidelity are not published.
        pinned, ttl_s: as `ArtifactStore.publish` takes them.
        parts: whether parts of each artifact are measured too, see `compress_prefill`.
    """

    place: ModelPlace
    namespace: str
    spec: CompressionSpec
    min_fidelity: float = 0.0
    retries: tuple[CompressionSpec, ...] = ()
    refuse_low: bool = False
    pinned: bool = False
    ttl_s: float | None = None
    parts: bool = False


@dataclass(frozen=True)
class PrefixJob:
    """One artifact to compute.

    Args:
        artifact_id: from fingerprint, namespace, token ids and spec.
        token_ids: array of type "i".
        document: the first document with these tokens.
        retry_ids: of the artifacts, one of which it becomes when its fidelity is low and theirs is better.
    """

    artifact_id: str
    token_ids: array[int]
    document: DocumentRef
    retry_ids: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Retry:
    """What compressing again brought: agreement and divergence (nats) of the first try, divergence now."""

    fidelity: float
    kl: float
    kl_now: float


@dataclass(frozen=True)
class Stored:
    """An artifact that is published.

    Args:
        artifact_id: the job's. retry_id: the artifact's own id, when the job's document was compressed again.
        tokens: in the prefix. bytes_full: of its exact cache. bytes_stored: of its blob.
        fidelity: top-1 agreement with the exact cache, 0 to 1. kl: divergence from it (nats).
        retry: what compressing it again brought, in the run that did.
        low: whether its fidelity is (`low_fidelity.Standard`).
        parts: whether this run measured parts of it.
    """

    artifact_id: str
    tokens: int
    bytes_full: int
    bytes_stored: int
    fidelity: float
    kl: float
    retry_id: str | None = None
    retry: Retry | None = None
    low: bool = False
    parts: bool = False

    @property
    def own_id(self) -> str:
        """The id in the store."""
        return self.retry_id or self.artifact_id


@dataclass(frozen=True)
class Failed:
    """An artifact that is not published, and why, in one line. `again`: another try may well succeed."""

    artifact_id: str
    reason: str
    again: bool = False


Outcome = Stored | Failed
