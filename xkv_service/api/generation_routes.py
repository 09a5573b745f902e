"""/v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from xkv_service.api.answers import ChatCompletion, Completion, ModelList, ModelObject
from xkv_service.api.errors import EVENTS
from xkv_service.api.formats import ChatFormat, CompletionFormat, Format
from xkv_service.api.generation import GenerationResponse
from xkv_service.api.requests import ChatBody, CompletionBody
from xkv_service.api.server import ERRORS, Server, key_of, slot_of
from xkv_service.engine.messages import GenerationRequest


def _answers(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint, for the OpenAPI document."""
    stream = {EVENTS: {"schema": {"type": "string"}}}
    headers = {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in (
            ("x-xkv-artifact", "The stored prefix that served the prompt."),
            ("x-xkv-part", "The share of its columns that did, where it was not all."),
            ("x-xkv-miss", "Why none did, or not as far as one goes."),
            ("x-request-id", "Names the request in the logs."),
        )
    }
    return {200: {"model": model, "content": stream, "headers": headers}, **ERRORS}


def generation_routes(server: Server) -> APIRouter:
    """The routes that answer prompts."""
    router = APIRouter(prefix="/v1", tags=["answers"], dependencies=server.bearer)

    @router.post("/chat/completions", response_class=Response, responses=_answers(ChatCompletion))
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """The next message of a conversation."""
        form = ChatFormat(request.state.request_id, server.model, body.model, body.logprobs)
        messages = [message.plain() for message in body.messages]
        return await _answer(server, request, body, form, lambda: server.renderer.chat(messages))

    @router.post("/completions", response_class=Response, responses=_answers(Completion))
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """How a text goes on."""
        name, logprobs = request.state.request_id, body.logprobs is not None
        form = CompletionFormat(name, server.model, body.model, logprobs)
        prompt = body.prompt
        return await _answer(server, request, body, form, lambda: server.renderer.completion(prompt))

    @router.get("/models", responses=ERRORS)
    async def list_models() -> ModelList:
        """The names that requests may give as `model`."""
        return ModelList(object="list", data=[_model(server, name) for name in server.model.names])

    @router.get("/models/{name:path}", responses=ERRORS)
    async def retrieve_model(name: str) -> ModelObject:
        """One of them."""
        server.check_model(name)
        return _model(server, name)

    return router


async def _answer(
    server: Server,
    request: Request,
    body: ChatBody | CompletionBody,
    form: Format,
    render: Callable[[], tuple[int, ...]],
) -> Response:
    """Render the prompt, find its prefix, and have it answered."""
    server.check_model(body.model)
    key = key_of(request)
    ids = await server.rendered(render)
    source = "messages" if isinstance(body, ChatBody) else "prompt"
    server.renderer.check_length(len(ids), source)
    most = min(body.asked_tokens or server.settings.max_answer_tokens, _room(server, len(ids)))
    slot_of(request).add_prompt(len(ids), source)
    match, miss = await server.match(ids, key.namespace, body.prefix_id)
    wanted = GenerationRequest(
        id=request.state.request_id,
        token_ids=ids,
        settings=body.settings(most),
        namespace=key.namespace,
        match=match,
        miss=miss,
        prefix_id=body.prefix_id,
        top_logprobs=body.top_count,
        timeout_s=server.settings.request_timeout_s,
        queue_timeout_s=server.settings.queue_timeout_s,
        streamed=body.stream,
    )
    return GenerationResponse(
        server.backend,
        wanted,
        request.state.read_at,
        form,
        stream=body.stream,
        usage=body.stream_options.include_usage,
        traffic=server.traffic,
        drain=server.drain,
    )


def _room(server: Server, prompt_tokens: int) -> int:
    """Tokens that an answer may have: what the window leaves, and what the server allows."""
    window, most = server.model.window, server.settings.max_answer_tokens
    return most if window is None else min(most, window - prompt_tokens)


def _model(server: Server, name: str) -> ModelObject:
    return ModelObject(
        id=name,
        object="model",
        created=server.model.created,
        owned_by="xkv",
        context_window=server.model.window,
    )
