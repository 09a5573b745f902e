"""`Server`: the parts that the routes of one app share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request, Security
from fastapi.security import HTTPBearer

from xkv_service.api.admission import Admission, Slot
from xkv_service.api.backend import Backend, PrefixService
from xkv_service.api.drain import Drain
from xkv_service.api.errors import APIError, ErrorBody, shortened
from xkv_service.api.keys import Key, KeyRing
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.api.metrics import Metrics
from xkv_service.api.model import ServedModel
from xkv_service.api.prompts import PromptRenderer
from xkv_service.api.settings import APISettings
from xkv_service.api.traffic import Traffic
from xkv_service.engine.messages import Miss

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused."},
    "5XX": {"model": ErrorBody, "description": "It may succeed later; see Retry-After."},
}

_RENDERERS = 4
"""Threads that render prompts: a tokenizer lets others run, so several long ones take several cores."""
Rendered = TypeVar("Rendered")


@dataclass
class Server:
    """What one app serves from.

    Args:
        finder: looks prompts up; None: no stored prefixes are used. prefixes: makes and keeps them.
    """

    model: ServedModel
    backend: Backend
    finder: PrefixFinder | None
    prefixes: PrefixService | None
    keys: KeyRing
    settings: APISettings
    metrics: Metrics
    traffic: Traffic
    admission: Admission
    drain: Drain = field(default_factory=Drain)
    renderers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_RENDERERS, "xkv-render"), repr=False
    )

    @property
    def bearer(self) -> list[Any]:
        """What routes say of keys in the OpenAPI document; the doorkeeper has looked at the key already."""
        return [] if self.keys.is_open else [Security(HTTPBearer(auto_error=False))]

    @property
    def renderer(self) -> PromptRenderer:
        """Renders prompts for the model."""
        return PromptRenderer(self.model)

    async def rendered(self, render: Callable[[], Rendered]) -> Rendered:
        """What a renderer makes, in a thread: no prompt waits behind what is asked of a store."""
        return await asyncio.wrap_future(self.renderers.submit(render))

    def close(self) -> None:
        """Let the threads end."""
        self.renderers.shutdown(wait=False, cancel_futures=True)
        for part in (self.finder, self.prefixes):
            if part is not None:
                part.close()

    def check_model(self, name: str) -> None:
        """Refuse another model's name.

        Raises:
            APIError: 404.
        """
        if name not in self.model.names:
            names = " or ".join(map(repr, self.model.names))
            message = f"no model {shortened(name)!r}: use {names}"
            raise APIError(404, message, param="model", code="model_not_found")

    async def match(self, prompt: tuple[int, ...], namespace: str, prefix_id: str | None) -> Found:
        """The stored prefix of a prompt: the named one if there is any, else the longest.

        Raises:
            APIError: the prompt does not begin with the named one.
        """
        if self.finder is None:
            return None, Miss("no_artifact", "this server keeps no prefixes")
        if prefix_id is None:
            return await self._timed(self.finder.find(prompt, namespace))
        match, miss = await self._timed(self.finder.named(prefix_id, prompt, namespace))
        if match is None:
            match, _ = await self._timed(self.finder.find(prompt, namespace))
        return match, miss

    async def _timed(self, found: Any) -> Found:
        with self.metrics.lookup.time():
            result: Found = await found
        if result[1] is not None:
            self.metrics.lost_at_lookup[result[1].reason] += 1
        return result


def key_of(request: Request) -> Key:
    """Whose request it is."""
    key: Key = request.state.key
    return key


def slot_of(request: Request) -> Slot:
    """The place of a request that has a body."""
    slot: Slot = request.state.slot
    return slot
