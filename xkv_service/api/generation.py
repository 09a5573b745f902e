"""`GenerationResponse`: runs one request on the backend and sends what comes, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xkv_service.api.answers import ServedFrom, Usage
from xkv_service.api.backend import Backend
from xkv_service.api.drain import Drain
from xkv_service.api.errors import EVENTS, RETRY_S, APIError, of_failure
from xkv_service.api.formats import Format
from xkv_service.api.request_log import CLIENT_LEFT
from xkv_service.api.traffic import Traffic
from xkv_service.engine.messages import (
    Delta,
    Event,
    Failed,
    FailureKind,
    Finished,
    GenerationRequest,
    Started,
)

_log = logging.getLogger(__name__)
_GRACE_S = 5.0
"""The engine ends a request that takes too long by itself; this much later the server does."""
_STREAM_HEADERS = {
    "content-type": f"{EVENTS}; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_DONE = b"data: [DONE]\n\n"


@dataclass
class Outcome:
    """What became of one request, for log and metrics.

    Args:
        read_at: when its body had been read. Times begin then: what it took before was the client's.
    """

    read_at: float
    started: Started | None = None
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    generated: int = 0
    finish: str = "cancelled"
    failed: FailureKind | None = None
    _last: float = 0.0

    def note(self, event: Event) -> None:
        """Take an event in."""
        now = time.perf_counter()
        if isinstance(event, Started):
            self.started, self.first_token_s, self._last = event, now - self.read_at, now
            self.generated, self.gaps_s = 0, []
        elif isinstance(event, Delta):
            later = event.tokens if self.generated else event.tokens - 1  # than the first one of all
            if later > 0:
                self.gaps_s += [(now - self._last) / later] * later
            self.generated += event.tokens
            self._last = now
        elif isinstance(event, Finished):
            self.finish, self.generated = event.finish, event.generated_tokens
        else:
            self.finish, self.failed = f"failed: {event.kind}", event.kind

    def fields(self) -> dict[str, Any]:
        """For the log."""
        told = {"finish": self.finish, "generated_tokens": self.generated}
        if (started := self.started) is None or self.first_token_s is None:
            return told
        return {
            **told,
            "first_token_s": round(self.first_token_s, 6),
            "prompt_tokens": started.prompt_tokens,
            "cached_tokens": started.cached_tokens,
            "artifact": started.artifact_id,
            "part": started.part,
            "miss": started.miss and started.miss.reason,
            "queued_s": round(started.queued_seconds, 6),
            "load_s": round(started.load_seconds, 6),
        }


class GenerationResponse(Response):
    """The answer to one request. It is begun when it is sent, so that its headers can tell of its prompt.

    Args:
        backend: runs the request. request: what to run.
        read_at: when its body had been read. form: how its events are told.
        stream: as they come. usage: at the end of a stream too.
        traffic: told how it went. drain: says when answers are broken off.
    """

    def __init__(
        self,
        backend: Backend,
        request: GenerationRequest,
        read_at: float,
        form: Format,
        *,
        stream: bool,
        usage: bool,
        traffic: Traffic,
        drain: Drain,
    ) -> None:
        super().__init__()
        self._backend, self._request, self._format = backend, request, form
        self._stream, self._usage = stream, usage
        self._traffic, self._drain = traffic, drain
        self._outcome = Outcome(read_at)
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. A client that goes away, time that runs out, or the server's end ends the request on the
        backend."""
        state = scope["state"]
        work = asyncio.ensure_future(self._send_stream(send) if self._stream else self._send_whole(send))
        left = asyncio.ensure_future(_until_client_leaves(receive))
        over = asyncio.ensure_future(self._drain.until_over())
        try:
            done, _ = await asyncio.wait(
                {work, left, over},
                timeout=self._request.timeout_s + _GRACE_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if work in done:
                work.result()
            elif left in done:
                state["outcome"] = CLIENT_LEFT
            elif over in done:
                await self._break_off(work, _cancelled_error(), send)
            else:
                late = APIError(504, f"no answer within {self._request.timeout_s:g} s", code="timeout")
                await self._break_off(work, late, send)
        finally:  # first what cannot wait: a server may cancel a request once more meanwhile
            state["answer"] = self._outcome.fields()
            self._traffic.add(self._request.namespace, self._outcome)
            await _cancelled(work, left, over)

    async def _break_off(self, work: asyncio.Future[None], error: APIError, send: Send) -> None:
        await _cancelled(work)
        self._outcome.finish = f"failed: {error.code}"
        with suppress(asyncio.TimeoutError):  # a client that reads nothing
            await asyncio.wait_for(self._tell(error, send), _GRACE_S)

    async def _send_whole(self, send: Send) -> None:
        deltas: list[Delta] = []
        async with aclosing(self._backend.generate(self._request)) as events:
            async for event in events:
                self._outcome.note(event)
                if isinstance(event, Started):
                    deltas = []
                elif isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Failed):
                    raise of_failure(event)
                elif isinstance(event, Finished):
                    await self._send_finished(deltas, event, send)
                    return
        raise APIError(500, "the engine gave no answer", code="internal_error")

    async def _send_finished(self, deltas: list[Delta], finished: Finished, send: Send) -> None:
        started = self._outcome.started
        assert started is not None
        if finished.finish == "cancelled":
            raise _cancelled_error()
        usage = Usage.of(started, finished.generated_tokens)
        answer = self._format.whole(deltas, finished.finish, ServedFrom.of(started), usage)
        content = answer.model_dump_json(exclude_unset=True).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        await self._begin(send, started, headers)
        await send({"type": "http.response.body", "body": content})

    async def _send_stream(self, send: Send) -> None:
        try:
            async with aclosing(self._backend.generate(self._request)) as events:
                async for event in events:
                    self._outcome.note(event)
                    if await self._send_event(event, send):
                        return
            raise APIError(500, "the engine gave no answer", code="internal_error")
        except APIError as error:
            await self._tell(error, send)
        except Exception:
            if not self._begun:
                raise
            _log.exception("the stream failed", extra={"request_id": self._request.id})
            await self._tell(APIError(500, "internal error", code="internal_error"), send)

    async def _send_event(self, event: Event, send: Send) -> bool:
        """Send what an event says; whether it was the last one."""
        if isinstance(event, Started):
            await self._begin(send, event, _STREAM_HEADERS)
            await _send_chunks(send, self._format.opening())
        elif isinstance(event, Delta):
            if event.text or event.logprobs:
                await _send_chunks(send, [self._format.piece(event)])
        elif isinstance(event, Failed):
            raise of_failure(event)
        elif event.finish == "cancelled":
            raise _cancelled_error()
        else:
            started = self._outcome.started
            assert started is not None
            usage = Usage.of(started, event.generated_tokens) if self._usage else None
            await _send_chunks(send, self._format.closing(event.finish, ServedFrom.of(started), usage))
            await send({"type": "http.response.body", "body": _DONE})
            return True
        return False

    async def _begin(self, send: Send, started: Started, headers: dict[str, str]) -> None:
        """Send status and headers."""
        told = dict(headers)
        if started.artifact_id is not None:
            told["x-xkv-artifact"] = started.artifact_id
        if started.part is not None:
            told["x-xkv-part"] = f"{started.part:g}"
        if started.miss is not None:
            told["x-xkv-miss"] = started.miss.reason
        self._begun = True
        raw = [(name.encode("ascii"), value.encode("ascii")) for name, value in told.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _tell(self, error: APIError, send: Send) -> None:
        """Answer with an error, or end a stream that has begun with one."""
        if not self._begun:
            raise error
        if self._stream:
            await send({"type": "http.response.body", "body": error.event()})


async def _send_chunks(send: Send, chunks: Any) -> None:
    body = b"".join(_event(chunk) for chunk in chunks)
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[None]) -> None:
    """Cancel tasks and wait until they are done, whatever comes of it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _cancelled_error() -> APIError:
    return APIError(
        503, "the answer was broken off: the server stops", code="cancelled", retry_after_s=RETRY_S
    )
