"""What is much longer than the window is refused by its beginning: no request has megabytes tokenized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engines import paced_backend
from serving import Served, serve

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.models import LoadedModel

LONG = "All rivers end in the sea, and few of them say when. " * 20_000
MANY = [{"role": "user" if at % 2 == 0 else "assistant", "content": LONG[:100]} for at in range(10_001)]
ONE = [{"role": "user", "content": LONG}]
TELL: dict[str, Any] = {"model": "tiny", "max_tokens": 2}


@pytest.fixture(scope="module")
def keeping(served_model: ServedModel, store: ArtifactStore, loaded: LoadedModel) -> Iterator[Served]:
    maker = PrefixMaker(store, loaded)
    try:
        prefixes = StoredPrefixes(store, maker)
        with (
            paced_backend(loaded, store) as backend,
            serve(create_app(served_model, backend, prefixes=prefixes)) as served,
        ):
            yield served
    finally:
        maker.close()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**TELL, "prompt": LONG}, "prompt"),
        ("/v1/chat/completions", {**TELL, "messages": ONE}, "messages"),
        ("/v1/chat/completions", {**TELL, "messages": MANY}, "messages"),
        ("/v1/prefixes", {"document": LONG}, "document"),
        ("/v1/prefixes", {"document": "short", "system_prompt": LONG}, "document"),
        ("/v1/prefixes", {"messages": ONE}, "messages"),
        ("/v1/prefixes", {"text": LONG}, "text"),
    ],
)
def test_a_million_characters_are_not_tokenized(
    keeping: Served,
    served_model: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    param: str,
) -> None:
    window, kind = served_model.window, type(served_model.tokenizer)
    tokenized: list[int] = []
    real = kind.__call__

    def counted(self: Any, text: str, *others: Any, **options: Any) -> Any:
        tokenized.append(len(text))
        return real(self, text, *others, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    with keeping.http() as http:
        answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert f"has more than {window:,} tokens" in error["message"]
    assert window is not None and 0 < sum(tokenized) <= 8 * window
