"""`RemoteMaker`: a compressor, reached through a Serve handle."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from xkv_service.api.backend import NewPrefix, PrefixRecord
from xkv_service.errors import Overloaded
from xkv_workers.serving.compressor import Refused

_log = logging.getLogger(__name__)
_PATIENCE_S = 15.0
"""One that died is replaced: nobody waits for it to load its model."""


class RemoteMaker:
    """Has prefixes made elsewhere.

    Args:
        compressor: the handle of the compressor deployment.
    """

    def __init__(self, compressor: Any) -> None:
        self._compressor = compressor

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        response = self._compressor.create.remote(new)
        try:
            answer: PrefixRecord | Refused = await asyncio.wait_for(response, _PATIENCE_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            response.cancel()
            _log.warning("the compressor does not answer: %s", error or type(error).__name__)
            raise Overloaded("no prefix can be made now", hint="try again in a minute") from None
        if isinstance(answer, Refused):
            raise answer.error
        return answer
