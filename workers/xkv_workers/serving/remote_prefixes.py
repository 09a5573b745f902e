"""`RemotePrefixes`: the `PrefixService` of a compressor, reached through a Serve handle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixPage, PrefixRecord
from xkv_service.errors import Overloaded
from xkv_workers.serving.compressor import Refused

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class RemotePrefixes:
    """A `PrefixService`.

    Args:
        compressor: the handle of the compressor deployment.
    """

    def __init__(self, compressor: Any) -> None:
        self._compressor = compressor

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        made: PrefixRecord = await self._ask("create", new)
        return made

    async def page(self, namespace: str, cursor: str | None, limit: int) -> PrefixPage:
        """As `PrefixService`."""
        found: PrefixPage = await self._ask("page", namespace, cursor, limit)
        return found

    async def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """As `PrefixService`."""
        found: PrefixRecord | None = await self._ask("get", namespaces, prefix_id)
        return found

    async def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """As `PrefixService`."""
        found: PrefixRecord | None = await self._ask("change", namespaces, prefix_id, changes)
        return found

    async def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """As `PrefixService`."""
        return bool(await self._ask("delete", namespaces, prefix_id))

    async def _ask(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            answer = await self._compressor.call.remote(method, *arguments)
        except (RayError, RayServeException) as error:
            _log.warning("the compressor does not answer: %s", error)
            raise Overloaded("prefixes cannot be made or changed now", hint="try again in a minute") from None
        if isinstance(answer, Refused):
            raise answer.error
        return answer
