"""What the HTTP side costs: a streamed token, a request, a lookup, and a lookup while Redis is down.

python benchmarks/http_server.py --out benchmarks/results/http_server.json

The app is called in this process, without a network, and its backend answers at once. Baselines, in the
same process: an app that sends the same number of ready-made events, and the store's own lookup.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bundled import document_ids, load
from report import Report, command

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.api.app import create_app
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.settings import APISettings
from xkv_service.engine.messages import Delta, EngineState, Event, Finished, GenerationRequest, Started

TOKENS, WORD = 500, "word "


class Ready:
    """A backend whose answers are there already."""

    waiting = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """As many tokens as may be."""
        yield Started(prompt_tokens=len(request.token_ids), cached_tokens=0)
        for _ in range(request.settings.max_new_tokens):
            yield Delta(WORD, 1)
        yield Finished("length", request.settings.max_new_tokens)

    async def states(self) -> list[EngineState]:
        """None."""
        return []


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads its request and sends as many events, each the same."""
    stream = json.loads((await receive())["body"])["stream"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    chunk = {"id": "a", "choices": [{"index": 0, "delta": {"content": WORD}}], "model": "demo"}
    for _ in range(TOKENS if stream else 0):
        body = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def call(app: Any, body: dict[str, Any]) -> None:
    """One request to an ASGI app."""
    raw = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent = []

    async def receive() -> Any:
        return raw.pop() if raw else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    await app(
        {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "root_path": "",
         "scheme": "http", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
         "server": ("localhost", 80), "http_version": "1.1", "asgi": {"version": "3.0"}},
        receive, send,
    )  # fmt: skip
    assert sent[0]["status"] == 200, sent


async def cpu_us(work: Callable[[], Awaitable[None]], rounds: int) -> float:
    """CPU microseconds of one round, the median of several."""
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        await work()
        taken.append(time.process_time() - began)
    return 1e6 * sorted(taken)[rounds // 2]


async def measure_requests(report: Report, model: ServedModel, rounds: int) -> None:
    """A request, and a streamed token."""
    app = create_app(model, Ready())
    body = {"model": model.name, "messages": [{"role": "user", "content": "Hello"}], "stream": False}
    for what, stream, per in (("request", False, 1), ("streamed token", True, TOKENS)):
        asked = {**body, "stream": stream, "max_tokens": per}
        base = await cpu_us(lambda asked=asked: call(bare, asked), rounds) / per  # type: ignore[misc]
        ours = await cpu_us(lambda asked=asked: call(app, asked), rounds) / per  # type: ignore[misc]
        report.add(what=what, cpu_us=ours, baseline_cpu_us=base, ratio=ours / base)


async def measure_lookups(report: Report, rounds: int, tokens: int) -> None:
    """A lookup by the server, and the same while Redis is down."""
    loaded = load()
    ids = document_ids(loaded, tokens).tolist()
    factors = compress(loaded.model, ids, CompressionSpec())
    fields = factors.manifest_fields()
    fingerprint = loaded.identity.fingerprint
    manifest = PrefixManifest(
        id=artifact_id(fingerprint, "default", ids, fields["spec"]),
        model=loaded.identity,
        namespace="default",
        document=DocumentRef(uri="document", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    prompt = (*ids, *ids[:200])
    with tempfile.TemporaryDirectory() as folder, ArtifactStore.open(folder, patience_s=0) as store:
        store.publish(manifest, factors.to_tensors())
        finder = PrefixFinder(store, loaded.identity, APISettings())

        async def found() -> None:
            assert (await finder.find(prompt, "default"))[0] is not None

        async def direct() -> None:
            assert store.lookup(fingerprint, "default", prompt) is not None

        await found()
        for what, work in (("lookup", found), ("store's own lookup", direct)):
            times = await wall_ms(work, rounds)
            report.add(what=what, tokens=len(prompt), ms=times[rounds // 2], p99_ms=times[rounds * 99 // 100])
        store.close()

        async def missed() -> None:
            assert (await finder.find(prompt, "default"))[0] is None

        first = (await wall_ms(missed, 1))[0]
        later = await wall_ms(missed, rounds)
        report.add(what="lookup, Redis down", first_ms=first, ms=later[rounds // 2], p99_ms=later[-1])
        finder.close()


async def wall_ms(work: Callable[[], Awaitable[None]], rounds: int) -> list[float]:
    """Milliseconds of each round, in order of size."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        taken.append(1e3 * (time.perf_counter() - began))
    return sorted(taken)


async def measure(report: Report, rounds: int, tokens: int) -> None:
    """All of it."""
    await measure_requests(report, ServedModel.of(load()), rounds)
    await measure_lookups(report, rounds, tokens)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/http_server.json"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    report = Report("http_server", command(), "an app of ready-made events")
    asyncio.run(measure(report, arguments.rounds, arguments.tokens))
    report.write(arguments.out)


if __name__ == "__main__":
    main()
