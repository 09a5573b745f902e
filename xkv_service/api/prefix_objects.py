"""What /v1/prefixes answers: prefixes as clients see them, and whether this server uses them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from xkv_service.api.backend import PrefixPage, PrefixRecord, PrefixStatus
from xkv_service.api.server import Server


class PrefixObject(BaseModel):
    """A stored prefix, or one that is being made."""

    id: str
    object: Literal["prefix"]
    status: PrefixStatus
    namespace: str
    model: str
    name: str
    tokens: int
    created_at: int
    bytes: int | None
    ratio: float | None
    fidelity: float | None = Field(description="Top-1 agreement with the exact cache, 0 to 1.")
    kl: float | None = Field(description="KL divergence from the exact cache's predictions, nats.")
    kl_limit: float | None = Field(description="Above it `kl` is low fidelity, by the calibration; or null.")
    usable: bool | None = Field(
        description="Whether this server serves prompts from it; null until it is ready."
    )
    unusable_reason: str | None = Field(description="Why it does not, for people.")
    expires_at: int | None = Field(
        description="When it may be deleted, seconds since the epoch. Null: never, or it is not ready yet."
    )
    pinned: bool
    error: str | None

    @classmethod
    def of(cls, record: PrefixRecord, server: Server) -> PrefixObject:
        """As the service knows it."""
        reason = _unusable(record, server) if record.status == "ready" else None
        return cls(
            id=record.id,
            object="prefix",
            status=record.status,
            namespace=record.namespace,
            model=record.model,
            name=record.name,
            tokens=record.tokens,
            created_at=int(record.created),
            bytes=record.bytes,
            ratio=record.ratio,
            fidelity=record.fidelity,
            kl=record.kl,
            kl_limit=record.kl_limit,
            usable=reason is None if record.status == "ready" else None,
            unusable_reason=reason,
            expires_at=None if record.expires is None else int(record.expires),
            pinned=record.pinned,
            error=record.error,
        )


class PrefixList(BaseModel):
    """A page of prefixes. Where it `has_more`, the next one comes `after` its `last_id`."""

    object: Literal["list"]
    data: list[PrefixObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, page: PrefixPage, server: Server) -> PrefixList:
        """As the service knows it."""
        data = [PrefixObject.of(record, server) for record in page.records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(object="list", data=data, first_id=first, last_id=last, has_more=page.more)


class DeletedPrefix(BaseModel):
    """What is gone."""

    id: str
    object: Literal["prefix"]
    deleted: bool


def _unusable(record: PrefixRecord, server: Server) -> str | None:
    """Why a lookup never takes a stored prefix (see `PrefixFinder`), and what to do; None where it does."""
    fidelity, settings = record.fidelity, server.settings
    if record.fingerprint != server.model.identity.fingerprint:
        return "it was made with another model, or another version of this one: have it made again"
    if fidelity is not None and fidelity < settings.min_fidelity:
        asked = (
            f"its fidelity {fidelity:.3f} is below the {settings.min_fidelity:g} that this server asks for"
        )
        return f"{asked}: have it made with a lower ratio"
    if record.tokens < settings.min_match_tokens:
        return f"it has {record.tokens} tokens, fewer than the {settings.min_match_tokens} that pay"
    return None
