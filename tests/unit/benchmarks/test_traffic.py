"""What the traffic benchmark says of memory, of damaged blobs, and of the faults that it caused."""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from artifact_samples import sample
from openai import AsyncOpenAI

from benchmarks import traffic_budgets, traffic_client
from benchmarks.traffic_budgets import BudgetWatch, filled
from benchmarks.traffic_check import check, margin_where_they_part
from benchmarks.traffic_client import _request
from benchmarks.traffic_damage import Damage, met
from benchmarks.traffic_faults import Strike
from benchmarks.traffic_memory import by_minute, early_and_late, growth
from benchmarks.traffic_redis import OwnRedis
from xkv_artifacts.errors import CorruptArtifact, MissingBlob
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.metrics import Metrics
from xkv_service.engine.messages import EngineState


def test_growth_is_that_of_the_second_half() -> None:
    dice = random.Random(0)
    seconds = [5.0 * number for number in range(120)]
    filling = [min(100.0 + second, 400.0) for second in seconds]  # full after 300 of 600 s
    flat = [(at, held + 50, held + dice.uniform(-2, 2)) for at, held in zip(seconds, filling, strict=True)]
    leaking = [(at, held, held + 6 * at / 60) for at, held, _ in flat]
    one, other = growth({"engine": flat, "ingress": leaking, "too short": flat[:3]}, full_s=300.0)
    assert one["part"] == "engine" and abs(one["mib_a_minute"]) < 4 * one["error"] < 0.5
    assert other["mib_a_minute"] == pytest.approx(6.0, abs=0.1)
    assert early_and_late(flat) == {"mib_early": pytest.approx(372.5, abs=3), "mib_late": 450.0}
    for row, gained in (
        (one, 0.0),
        (other, 20.0),
    ):  # of 6 a minute, from the middle of 100 s to that of others
        assert row["mib_last_third"] - row["mib_first_third"] == pytest.approx(gained, abs=2)
        assert row["mib_last_third"] - row["mib_second_third"] == pytest.approx(gained / 2, abs=2)
    from_the_start = growth({"engine": flat})[0]
    assert from_the_start["mib_last_third"] - from_the_start["mib_first_third"] > 150  # it was filling
    minutes = by_minute({"engine": flat})["engine"]
    assert len(minutes) == 10 and minutes[-1] == pytest.approx(400, abs=1)


def test_when_a_budget_was_full() -> None:
    held = {
        "prefix_memory": [(5.0, 0.0), (10.0, 5e6), (15.0, 5.9e6), (20.0, 5.6e6)],
        "tail_memory": [(5.0, 1e6), (10.0, 2e6), (15.0, 3e6), (20.0, 4e6)],  # it never was
        "stored_tails": [(5.0, 0.0)],
    }
    full = filled(held, {"prefix_memory": "6MiB", "tail_memory": "1GiB", "stored_tails": "0"})
    assert [(row["of"], row["most_bytes"], row["full_s"]) for row in full] == [
        ("6MiB", 5.9e6, 15.0),
        ("1GiB", 4e6, 20.0),
        ("0", 0.0, None),
    ]


def test_what_a_server_holds_is_read_from_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_budgets, "EVERY_S", 0.05)
    page = Metrics()
    state = EngineState(1, 0, 0, prefix_bytes=6000, tail_bytes=700, prefixes=("a",), stored_tail_bytes=80)

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            type(self).asked += 1
            self.send_response(200 if self.asked > 1 else 500)
            self.end_headers()
            self.wfile.write(page.exposition([state]))

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        watch = BudgetWatch(f"http://127.0.0.1:{server.server_port}")
        while Handler.asked < 3:
            time.sleep(0.01)
        held = watch.end()
        server.shutdown()
    assert {budget: {size for _, size in seen} for budget, seen in held.items()} == {
        "prefix_memory": {6000.0},
        "tail_memory": {700.0},
        "stored_tails": {80.0},
    }


def test_damage_is_followed_until_it_is_mended(tmp_path: Path) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = [store.publish(*sample(range(40 + rank), uri=f"{rank}.txt")).id for rank in range(40)]
        damage = Damage(tmp_path / "store")
        damage.strike()
        assert damage.ids == made[:2]
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 0, "blobs_remade": 0}
        with pytest.raises(CorruptArtifact):
            store.load(made[0])
        store.publish(*sample(range(40), uri="0.txt"))
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 1, "blobs_remade": 1}


def test_a_loss_is_followed_until_it_is_mended(tmp_path: Path) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = [store.publish(*sample(range(40 + rank), uri=f"{rank}.txt")).id for rank in range(40)]
        damage = Damage(tmp_path / "store")
        damage.strike(missing=True)
        assert damage.ids == made[:2]
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 0, "blobs_remade": 0}
        with pytest.raises(MissingBlob):
            store.load(made[0])
        store.publish(*sample(range(40), uri="0.txt"))
        assert damage.mended() == {"blobs_damaged": 2, "blobs_found": 1, "blobs_remade": 1}


def test_who_met_damage_was_told_so() -> None:
    def answer(reason: str | None, **fields: Any) -> dict[str, Any]:
        return {"end": "answered", "xkv": {"miss": reason and {"reason": reason}}, **fields}

    answers = [
        answer("corrupt", right=True),
        answer("missing", right=False),
        answer("no_room", right=True),
        answer(None, right=True),
        {"end": "left"},
    ]
    assert met(answers) == {"met_damage": 2, "met_and_right": 1}


def strike(fault: str, folder: Path, redis: OwnRedis | None = None, url: str = "") -> Strike:
    """Of a server that is this process."""
    store, log = folder / "store", folder / "serve.log"
    return Strike(
        fault,
        server=os.getpid(),
        url=url,
        store=store,
        log=log,
        disk=None,
        redis=redis,
        damage=Damage(store),
    )


def test_a_redis_that_is_emptied_comes_back_empty(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "serve.log")
    logging.getLogger("xkv_artifacts").addHandler(handler)
    try:
        with ArtifactStore.open(str(tmp_path / "store")) as store, store.keeping_catalog():
            for number in range(3):
                store.publish(*sample(range(40 + number), uri=f"{number}.txt"))
            emptied = strike("empty-redis", tmp_path)
            emptied.now()
            struck = emptied.proof()
    finally:
        logging.getLogger("xkv_artifacts").removeHandler(handler)
    assert struck["deleted"] == ["catalog/catalog.aof"]
    assert len(struck["killed_redis"]) == 1 and struck["redis_after"] != struck["killed_redis"]
    assert "3 prefixes are listed again" in struck["said"][-1]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    redis = OwnRedis(tmp_path / "redis", away_s=0.5)
    yield redis
    redis.kill()


def test_a_redis_that_went_away_comes_back_with_its_data(tmp_path: Path, own_redis: OwnRedis) -> None:
    with ArtifactStore.open(str(tmp_path / "store"), own_redis.url) as store:
        made = store.publish(*sample(range(40), uri="0.txt")).id
        away = strike("redis-away", tmp_path, own_redis)
        away.now()
        struck = away.proof()
        assert psutil.pid_exists(struck["redis_after"][0])
        assert not psutil.pid_exists(struck["killed_redis"][0])
        assert struck["away_s"] >= 0.5
        assert struck["keys_before"] == struck["keys_after"] > 0
        assert [one.id for one in store.entries()] == [made]


def test_a_redis_that_loses_all_is_waited_for_until_it_lists_what_it_did(
    tmp_path: Path, own_redis: OwnRedis
) -> None:
    with ArtifactStore.open(str(tmp_path / "store"), own_redis.url) as store:
        made = store.publish(*sample(range(40), uri="0.txt")).id
        emptied = strike("redis-emptied", tmp_path, own_redis)
        with ThreadPoolExecutor(1) as pool:
            losing = pool.submit(emptied.now)
            while not losing.done():  # as a server does
                store.list_if_lost()
                time.sleep(0.05)
            losing.result()
        struck = emptied.proof()
        assert struck["listed_again"] == 1 and struck["redis_after"] != struck["killed_redis"]
        assert [one.id for one in store.entries()] == [made]


@pytest.fixture
def page() -> Iterator[str]:
    """The address of one that anybody may ask for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_redis_that_hangs_is_asked_about_meanwhile(tmp_path: Path, own_redis: OwnRedis, page: str) -> None:
    with ArtifactStore.open(str(tmp_path / "store"), own_redis.url) as store:
        store.publish(*sample(range(40), uri="0.txt"))
        hanging = strike("redis-hangs", tmp_path, own_redis, page)
        hanging.now()
        struck = hanging.proof()
    assert struck["away_s"] >= 0.5 and struck["polls"][200] >= 10
    assert psutil.Process(struck["stopped_redis"][0]).status() != psutil.STATUS_STOPPED


def test_who_was_answered_while_redis_was_away(own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(began: float, seconds: float, artifact: str | None, reason: str | None) -> dict[str, Any]:
        xkv = {"artifact": artifact, "miss": reason and {"reason": reason}}
        return {"end": "answered", "began": began, "seconds": seconds, "first_token_s": 0.5, "xkv": xkv}

    monkeypatch.setattr(own_redis, "_span", (100.0, 120.0))
    answers = [
        answer(99.0, 2.0, "a", None),  # begun before
        answer(101.0, 2.0, None, "unavailable"),
        answer(102.0, 2.0, "a", "unavailable"),
        answer(103.0, 2.0, None, None),
        answer(119.0, 2.0, None, "unavailable"),  # it ended later
        answer(121.0, 2.0, "a", None),  # it may have been in memory
        {"end": "error", "began": 110.0, "seconds": 1.0},
        {"end": "refused", "seconds": 1.0},
    ]
    seen = {"served_away": 3, "misses_away": {"unavailable": 2}, "first_load_s": None}
    assert own_redis.seen_by(answers) == seen
    late = [answer(124.0, 2.0, "b", None), answer(123.0, 9.0, "c", None)]
    assert own_redis.seen_by([*answers, *late]) == seen | {"first_load_s": 3.5}
    with pytest.raises(RuntimeError, match="nobody was answered"):
        own_redis.seen_by([answers[0], *answers[4:]])


@pytest.mark.parametrize(
    "fault", ["kill-replica", "kill-redis", "empty-redis", "redis-away", "redis-emptied", "slow-disk"]
)
def test_a_fault_that_did_not_happen_is_an_error(fault: str, tmp_path: Path) -> None:
    with ArtifactStore.open(str(tmp_path / "store")):
        pass  # nobody is left to be killed, and nothing is stored
    (tmp_path / "store" / "catalog" / "catalog.aof").unlink()
    (tmp_path / "serve.log").touch()
    missed = strike(fault, tmp_path)
    with pytest.raises(RuntimeError, match="was not done"):
        missed.now()
        missed.proof()


def test_no_fault_needs_no_proof(tmp_path: Path) -> None:
    assert strike("none", tmp_path).proof() == {}


def test_a_wrong_answer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    answer: dict[str, Any] = {
        "end": "answered",
        "messages": [
            {"role": "user", "content": "Anna Bell has the keys of the house.\n\nWho has the keys?"}
        ],
        "xkv": {"artifact": None, "prefix_tokens": 0},
        "text": "Nobody has.",
    }
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        assert check([answer, {"end": "left"}], store) == {"checked": 1, "wrong": 1, "ties": 0}
        assert answer["right"] is False
        alone = ast.literal_eval(capsys.readouterr().out.removeprefix("WRONG "))["alone"]
        assert check([answer | {"text": alone}, answer], store) == {"checked": 2, "wrong": 1, "ties": 0}


@pytest.mark.parametrize(
    ("answer", "margin"),
    [("It is Bo.", None), ("It was Bo.", 0.2), ("It is", 0.4), ("It is Bo. So", 0.5), ("", 0.1)],
)
def test_an_answer_is_excused_by_the_margin_where_it_parts(answer: str, margin: float | None) -> None:
    texts = ["", "It", "It is", "It is Bo", "It is Bo."]
    assert margin_where_they_part(texts, [0.1, 0.2, 0.4, 0.3, 0.5], answer) == margin


_EVENT = (
    b'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}\n\n'
)
_ERROR = b'data: {"error": {"message": "the replica died", "type": "server_error"}}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "ends", "end"),
    [
        (503, b'{"error": {"message": "busy"}}', True, "error"),
        (200, _EVENT + _ERROR, True, "error"),
        (200, _EVENT + b"data: [DONE]\n\n", True, "broken"),  # without usage, so not whole
        (200, _EVENT, True, "broken"),
        (200, _EVENT, False, "hang"),
        (None, b"", True, "broken"),
    ],
)
def test_only_what_the_server_says_is_a_clean_error(
    status: int | None, body: bytes, ends: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_client, "_PATIENCE_S", 10 if ends else 0.5)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if status is not None:
            kind = b"text/event-stream" if status == 200 else b"application/json"
            writer.write(b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: 999\r\n\r\n" % (status, kind))
            writer.write(body + b" " * (999 - len(body)) if b"error" in body or b"DONE" in body else body)
            await writer.drain()
        if not ends:
            await reader.read()
        writer.close()

    async def asked() -> dict[str, Any]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
            async with client:
                return await _request(client, "m", [{"role": "user", "content": "x"}], leave=False)

    assert asyncio.run(asked())["end"] == end
