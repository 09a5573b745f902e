"""Nothing that a key of one namespace asks tells what another namespace holds, by the time it takes either:
Redis is sent the same commands, answers with as many bytes, and the blob store is asked for the same.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
from artifact_samples import FINGERPRINT, sample
from engines import paced_backend
from redis_server import RedisServer
from redis_tap import RedisTap, Sent
from rivers import DOCUMENT, SETTINGS, key, publish
from serving import Served, serve

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.damage_board import Note
from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.origin import Origin
from xkv_artifacts.packable_blobs import PackableBlobs
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.models import LoadedModel

MODEL = ModelIdentity(fingerprint=FINGERPRINT, name="tiny", architecture="Llama", dtype="bfloat16")
PROMPT = [*range(3000)]
NOBODYS = "0" * 64
_TIME = re.compile(rb"\*2\r\n\$10\r\n\d+\r\n\$\d\r\n\d+\r\n")
"""The answer to TIME: its microseconds have as many digits as they need."""
THEIRS = Origin("theirs", {"ratio": 8.0}, 100, "a.md", "e" * 64)


class NotedBlobs(LocalBlobStore):
    """A folder that notes what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = list[tuple[str, str]]()

    def open(self, artifact_id: str) -> BinaryIO:
        self.asked.append(("open", artifact_id))
        return super().open(artifact_id)

    def exists(self, artifact_id: str) -> bool:
        self.asked.append(("exists", artifact_id))
        return super().exists(artifact_id)

    def size(self, artifact_id: str) -> int:
        self.asked.append(("size", artifact_id))
        return super().size(artifact_id)


@dataclass
class Seen:
    """What a request asks of Redis and of the blobs, and how much Redis answers."""

    commands: list[bytes]
    answer_bytes: list[int]
    blobs: list[tuple[str, str]]

    @classmethod
    def of(cls, sent: list[Sent], blobs: NotedBlobs, known_as: str = NOBODYS) -> Seen:
        """`known_as` is the id that was asked for, or its place: all are as long."""
        name, same = known_as.encode(), NOBODYS.encode()
        commands = [data.replace(name, same) for way, data in sent if way == "asked"]
        asked = [(what, one.replace(known_as, NOBODYS)) for what, one in blobs.asked]
        blobs.asked.clear()
        told = [_TIME.sub(b"", data) for way, data in sent if way == "told"]
        return cls(commands, [*map(len, told)], asked)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def tap(tmp_path: Path, redis: RedisServer) -> Iterator[RedisTap]:
    wire = RedisTap(tmp_path / "tap", redis.socket)
    yield wire
    wire.close()


@pytest.fixture
def writer(tmp_path: Path, redis: RedisServer) -> Iterator[ArtifactStore]:
    """The store without the wire: of everybody who publishes."""
    with ArtifactStore.open(str(tmp_path / "store"), redis.url) as opened:
        yield opened


@contextmanager
def wired(tmp_path: Path, tap: RedisTap) -> Iterator[tuple[ArtifactStore, NotedBlobs]]:
    """The store as a process has it whose Redis is behind the wire."""
    blobs, link = NotedBlobs(tmp_path / "store"), RedisLink(tap.url)
    with ArtifactStore(PackableBlobs(blobs), Catalog(link, blobs.store_id())) as store:
        yield store, blobs


def looked_up(tmp_path: Path, tap: RedisTap, *prompts: list[int]) -> tuple[list[Found], Seen]:
    """What a new process finds for a key of "mine", prompt after prompt, and all that it asks for it."""
    with wired(tmp_path, tap) as (store, blobs):
        finder = PrefixFinder(store, MODEL, SETTINGS)
        found = [asyncio.run(finder.find(prompt, "mine")) for prompt in prompts]
        return found, Seen.of(tap.take(), blobs)


@pytest.mark.parametrize("made_by", [FINGERPRINT, "b" * 64])
@pytest.mark.parametrize("own", [(), ("mine",), ("mine", "public")])
def test_a_lookup_is_the_same_whatever_another_namespace_holds(
    tmp_path: Path, writer: ArtifactStore, tap: RedisTap, own: tuple[str, ...], made_by: str
) -> None:
    for namespace in own:  # parts of the prompt, of this model and of another
        writer.publish(*sample(PROMPT[:200], namespace=namespace))
        writer.publish(*sample([9] * 200, namespace=namespace, fingerprint="b" * 64))
    writer.publish(*sample([5] * 100, namespace="theirs"))
    prompts = [PROMPT, PROMPT, [9] * 300, PROMPT[:70], PROMPT[:10], [5] * 100]
    looked_up(tmp_path, tap, *prompts)  # Redis knows the scripts from here on
    before = looked_up(tmp_path, tap, *prompts)
    for length in (70, 200, 201, 2999, 3000, 9000):
        writer.publish(*sample([*range(length)], namespace="theirs", fingerprint=made_by))
    assert looked_up(tmp_path, tap, *prompts) == before
    found, seen = before
    assert len(seen.commands) == len(seen.answer_bytes) > len(prompts)
    assert own or ([match for match, _ in found], seen.blobs) == ([None] * len(prompts), [])
    mine = writer.publish(*sample(PROMPT, namespace="mine")).id  # and the wire does tell of what is there
    found, after = looked_up(tmp_path, tap, *prompts)
    assert found[0][0] is not None and found[0][0].artifact_id == mine
    assert after.answer_bytes != seen.answer_bytes and ("open", mine) in after.blobs


@dataclass
class Keeper:
    """A server whose store is behind a wire, asked with the key of "mine"."""

    http: httpx.Client
    tap: RedisTap
    blobs: NotedBlobs
    theirs: str

    def asked(self, name: str, ask: Callable[[httpx.Client, str], httpx.Response]) -> tuple[Any, Seen]:
        """Status and text of an answer about the prefix `name`, and what it took."""
        self.tap.take()
        self.blobs.asked.clear()
        answer = ask(self.http, name)
        told = answer.json().get("xkv", answer.text)
        told = str(told).replace(name, NOBODYS).replace(name[:12], NOBODYS[:12])
        return (answer.status_code, told), Seen.of(self.tap.take(), self.blobs, name)


@pytest.fixture
def keeper(
    tmp_path: Path, writer: ArtifactStore, tap: RedisTap, loaded: LoadedModel, served_model: ServedModel
) -> Iterator[Keeper]:
    theirs = publish(writer, loaded, DOCUMENT, "theirs").id
    maker = PrefixMaker(writer, loaded)
    keys = KeyRing((key("mine"), key("theirs")))
    try:
        with wired(tmp_path, tap) as (store, blobs), paced_backend(loaded, writer) as backend:
            finder = PrefixFinder(store, loaded.identity, SETTINGS)
            prefixes = StoredPrefixes(store, maker)
            app = create_app(
                served_model, backend, finder=finder, prefixes=prefixes, keys=keys, settings=SETTINGS
            )
            with serve(app) as served, served.http("sk-mine") as http:
                assert is_there(served, theirs)
                yield Keeper(http, tap, blobs, theirs)
    finally:
        maker.close()


def is_there(served: Served, prefix_id: str) -> bool:
    """Whether the namespace that holds a prefix gets it, and answers from it."""
    with served.http("sk-theirs") as http:
        answer = chat(http, prefix_id).json()
        return get(http, prefix_id).status_code == 200 and answer["xkv"]["artifact"] == prefix_id


def get(http: httpx.Client, prefix_id: str) -> httpx.Response:
    return http.get(f"/v1/prefixes/{prefix_id}")


def patch(http: httpx.Client, prefix_id: str) -> httpx.Response:
    return http.patch(f"/v1/prefixes/{prefix_id}", json={"pin": True})


def delete(http: httpx.Client, prefix_id: str) -> httpx.Response:
    return http.delete(f"/v1/prefixes/{prefix_id}")


def chat(http: httpx.Client, prefix_id: str) -> httpx.Response:
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1, "prefix_id": prefix_id}
    return http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("noted", [None, Note(), Note(missing=True), Note(THEIRS)])
@pytest.mark.parametrize(("ask", "status"), [(get, 404), (patch, 404), (delete, 404), (chat, 200)])
def test_another_namespaces_prefix_is_asked_for_as_one_that_nobody_has(
    keeper: Keeper, writer: ArtifactStore, noted: Note | None,
    ask: Callable[[httpx.Client, str], httpx.Response], status: int,
) -> None:  # fmt: skip
    """Also one that is noted as damaged or missing; the note stays."""
    if noted is not None:
        assert writer.damaged.note(keeper.theirs, noted)
    for name in (keeper.theirs, NOBODYS):  # Redis knows the scripts from here on
        ask(keeper.http, name)
    answers = [keeper.asked(name, ask) for name in (keeper.theirs, NOBODYS, keeper.theirs, "f" * 64)]
    (code, told), seen = answers[0]
    assert answers == [answers[0]] * 4
    assert code == status and seen.commands and seen.blobs == []
    assert ask is not chat or "'evicted'" in told
    assert writer.damaged.get(keeper.theirs) == noted
