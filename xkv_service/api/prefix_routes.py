"""/v1/prefixes: have prefixes compressed, list, keep and delete them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from xkv_artifacts.times import seconds_of
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixService
from xkv_service.api.errors import APIError, shortened, told
from xkv_service.api.keys import Key
from xkv_service.api.prefix_objects import DeletedPrefix, PrefixList, PrefixObject
from xkv_service.api.requests import Body, Messages, Text
from xkv_service.api.server import ERRORS, Server, key_of, slot_of
from xkv_service.errors import InvalidPrompt, PrefixTooShort, RatioUnreachable
from xkv_service.spec import MOST_RATIO

LONGEST_TTL_S = 10 * 365 * 86_400


def _shown_as_it_is(name: str) -> str:
    """Refuse what people would not see in a list, but their terminals might obey."""
    for letter in name:
        if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp"):
            raise ValueError(f"U+{ord(letter):04X} is a control or format character: leave it out")
    return name


Name = Annotated[Text, Field(min_length=1, max_length=256), AfterValidator(_shown_as_it_is)]


def _seconds(ttl: Any) -> Any:
    """A time as `xkv ttl` takes it, or the number of seconds that it is."""
    if not isinstance(ttl, str):
        return ttl
    seconds = seconds_of(ttl)
    if seconds is None:
        raise ValueError(f'{shortened(ttl)!r} is not a time: give seconds, or "90s", "15m", "12h" or "7d"')
    return seconds


Ttl = Annotated[
    float,
    Field(gt=0, le=LONGEST_TTL_S),
    BeforeValidator(_seconds, json_schema_input_type=float | str),
]


class PrefixBody(Body):
    """A prefix to compress: exactly one of `document`, `messages` and `text`. Null counts as left out."""

    document: Text | None = Field(None, description="Opens the first user message of every chat about it.")
    messages: Messages | None = Field(
        None, description="The beginning of every chat that is to be served from it, a system prompt say."
    )
    text: Text | None = Field(None, description="The beginning of prompts of /v1/completions.")
    system_prompt: Text | None = Field(None, description="Of the chats about `document`.")
    name: Name | None = Field(None, description="For people: without control and format characters.")
    ratio: Annotated[float, Field(ge=1, le=MOST_RATIO)] | None = Field(
        None, description="Bytes of the exact cache / bytes stored."
    )
    ttl: Ttl | None = Field(
        None,
        description='How long it is kept once it is ready: seconds, or a text like "90s", "12h" or "7d".',
    )
    pin: bool = Field(False, description="Keep it whatever happens.")
    namespace: str | None = Field(None, description="The key's own, or the public one if the key may.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if value is not None}


class PrefixPatch(Body):
    """What to change; what is left out stays. A `ttl` of null takes the end away."""

    ttl: Ttl | None = None
    pin: bool | None = None


def prefix_routes(server: Server) -> APIRouter:
    """The routes of prefixes."""
    router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], dependencies=server.bearer, responses=ERRORS)
    public = server.settings.public_namespace

    def readable(key: Key) -> list[str]:
        return list(dict.fromkeys((key.namespace, public)))

    def writable(key: Key) -> list[str]:
        return [one for one in readable(key) if key.write_public or one != public]

    async def refuse_unwritable(key: Key, prefix_id: str) -> APIError:
        """A public prefix that this key may only read, or none at all."""
        if not key.write_public and await _service(server).get([public], prefix_id):
            return APIError(403, f"this key may not change prefixes of namespace {public!r}")
        return _no_prefix(prefix_id)

    @router.post("", status_code=202)
    async def create_prefix(body: PrefixBody, request: Request) -> PrefixObject:
        """Have a prefix compressed and stored. Returns at once; ask for it until its status is "ready"."""
        key, service = key_of(request), _service(server)
        namespace = key.namespace if body.namespace is None else body.namespace
        if namespace not in writable(key):
            raise _not_allowed(server, "write to", namespace, writable(key))
        try:
            new = await server.rendered(lambda: _rendered(server, body, namespace))
            slot_of(request).add_prompt(len(new.token_ids), _kind(body))
            return PrefixObject.of(await service.create(new), server)
        except RatioUnreachable as error:
            param = _kind(body) if isinstance(error, PrefixTooShort) else "ratio"
            raise APIError(400, told(error), param=param) from None

    @router.get("")
    async def list_prefixes(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64)] = None,
        namespace: Annotated[str | None, Query(max_length=64)] = None,
    ) -> PrefixList:
        """Prefixes of the key's namespace, or of the public one: those being made or failed, newest first,
        then last used first."""
        key = key_of(request)
        wanted = key.namespace if namespace is None else namespace
        if wanted not in readable(key):
            raise _not_allowed(server, "read", wanted, readable(key))
        return PrefixList.of(await _service(server).page(wanted, after, limit), server)

    @router.get("/{prefix_id}")
    async def retrieve_prefix(prefix_id: str, request: Request) -> PrefixObject:
        """One prefix."""
        record = await _service(server).get(readable(key_of(request)), prefix_id)
        if record is None:
            raise _no_prefix(prefix_id)
        return PrefixObject.of(record, server)

    @router.patch("/{prefix_id}")
    async def update_prefix(prefix_id: str, body: PrefixPatch, request: Request) -> PrefixObject:
        """Change how long a prefix is kept."""
        key = key_of(request)
        endless = "ttl" in body.model_fields_set and body.ttl is None
        changes = PrefixChanges(0 if endless else body.ttl, body.pin)
        record = await _service(server).change(writable(key), prefix_id, changes)
        if record is None:
            raise await refuse_unwritable(key, prefix_id)
        return PrefixObject.of(record, server)

    @router.delete("/{prefix_id}")
    async def delete_prefix(prefix_id: str, request: Request) -> DeletedPrefix:
        """Delete a prefix. Answers that it serves now come to their end."""
        key = key_of(request)
        if not await _service(server).delete(writable(key), prefix_id):
            raise await refuse_unwritable(key, prefix_id)
        return DeletedPrefix(id=prefix_id, object="prefix", deleted=True)

    return router


def _service(server: Server) -> PrefixService:
    if server.prefixes is None:
        raise APIError(501, "this server keeps no prefixes", code="not_supported")
    return server.prefixes


def _not_allowed(server: Server, verb: str, namespace: str, allowed: list[str]) -> APIError:
    """A namespace that is not for this key; a server without keys blames none."""
    asked, names = repr(shortened(namespace)), " and ".join(allowed) or "none"
    message = f"this key may not {verb} namespace {asked}: it may {verb} {names}"
    if server.keys.is_open:
        message = (
            f"without keys this server has only namespaces {names} (start it with --keys to use {asked})"
        )
    return APIError(403, message, param="namespace")


def _no_prefix(prefix_id: str) -> APIError:
    message = f"no prefix {shortened(prefix_id)!r} (GET /v1/prefixes lists those there are)"
    return APIError(404, message, param="prefix_id", code="prefix_not_found")


def _rendered(server: Server, body: PrefixBody, namespace: str) -> NewPrefix:
    """The tokens of a prefix, and what it is called."""
    kind, (source, render) = _kind(body), _source(server, body)
    try:
        ids = render()
    except InvalidPrompt as error:
        raise APIError(400, told(error), param=kind, code="invalid_prompt") from None
    server.renderer.check_length(len(ids), kind, prefix=True)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return NewPrefix(
        namespace=namespace,
        token_ids=ids,
        name=body.name or f"{kind}-{digest[:12]}",
        sha256=digest,
        ratio=body.ratio,
        ttl_s=body.ttl,
        pinned=body.pin,
    )


def _kind(body: PrefixBody) -> str:
    """Which of the sources it is."""
    given = [name for name in ("document", "messages", "text") if getattr(body, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise APIError(400, f"give exactly one of document, messages and text; there is {found}")
    if body.system_prompt is not None and given != ["document"]:
        raise APIError(400, "system_prompt goes with document", param="system_prompt")
    return given[0]


def _source(server: Server, body: PrefixBody) -> tuple[str, Callable[[], Any]]:
    """The source as text, and how to render it."""
    renderer = server.renderer
    if body.document is not None:
        document, system_prompt = body.document, body.system_prompt
        return document, lambda: renderer.document(document, system_prompt)
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        return json.dumps(messages), lambda: renderer.conversation(messages)
    text = body.text or ""
    return text, lambda: renderer.text(text)
