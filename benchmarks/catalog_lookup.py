"""Longest-prefix lookup in Redis with 100,000 artifacts in the catalog: time per lookup on loopback.

    python benchmarks/catalog_lookup.py

A timed lookup is all that a server does before it reads a blob: hash the prompt's blocks, a round trip (or
two) over TCP on 127.0.0.1, parse the answer. A prompt is hashed as far as the longest artifact of its
namespace goes: one namespace has 100,000 of up to 8,492 tokens, another a few that are as long as the longest
prompts. For some lookups of each kind the answer is compared with the document that the prompt was cut from:
at most 63 tokens may be lost, none when the prompt holds the whole document.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report import Report

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.embedded import server_binary
from xkv_artifacts.entry import Entry, spec_digest
from xkv_artifacts.keys import BLOCK_TOKENS, artifact_id
from xkv_artifacts.prefix_index import common_tokens
from xkv_artifacts.redis_link import RedisLink
from xkv_service.spec import CompressionSpec

FINGERPRINT = "a" * 64
SPEC = spec_digest(CompressionSpec().canonical())
SYSTEM_PROMPTS = 20
LONG_ARTIFACTS = 50
CHECKED = 200
RESULT = Path(__file__).parent / "results" / "catalog_lookup.json"


def noise(source: random.Random, count: int) -> bytes:
    """Random token ids below 65,536, as little-endian int32 bytes."""
    tokens = bytearray(source.randbytes(4 * count))
    tokens[2::4] = tokens[3::4] = bytes(count)
    return bytes(tokens)


class Corpus:
    """Documents of a namespace behind one of a few system prompts, made again from their number.

    Args:
        lengths: tokens of the shortest and of the longest document, system prompt aside.
    """

    def __init__(self, namespace: str, size: int, lengths: tuple[int, int]) -> None:
        self.namespace = namespace
        self.size = size
        self._lengths = lengths
        source = random.Random(1)
        self._systems = [noise(source, 300) for _ in range(SYSTEM_PROMPTS)]

    def document(self, number: int) -> bytes:
        source = random.Random(number)
        shortest, longest = self._lengths
        length = int(shortest * 2 ** source.uniform(0, math.log2(longest / shortest)))
        return self._systems[number % SYSTEM_PROMPTS] + noise(source, length)


def fill(catalog: Catalog, corpus: Corpus) -> dict[str, int]:
    """Publish every document; the number of each artifact id."""
    numbers = {}
    for number in range(corpus.size):
        tokens = corpus.document(number)
        ids = memoryview(tokens).cast("i")
        identity = artifact_id(FINGERPRINT, corpus.namespace, ids, {"ratio": 8})
        numbers[identity] = number
        catalog.publish(entry(identity, corpus.namespace, len(ids)), tokens)
        if number % 10_000 == 0:
            print(f"{number:,} artifacts", flush=True)
    return numbers


def entry(identity: str, namespace: str, tokens: int) -> Entry:
    return Entry(
        id=identity,
        blob=identity,
        bytes=tokens * 16_384,
        bytes_full=tokens * 131_072,
        tokens=tokens,
        model="bench",
        fingerprint=FINGERPRINT,
        namespace=namespace,
        document="bench",
        document_sha256="0" * 64,
        fidelity=1.0,
        kl=0.001,
        spec=SPEC,
        ratio=8.0,
        created=0.0,
        last_used=0.0,
    )


Prompts = list[tuple[bytes, int | None]]


def prompts(corpus: Corpus, count: int) -> dict[str, Prompts]:
    """By kind: token bytes, and the document that they begin as (None: no certain one)."""
    source = random.Random(2)
    documents = [(corpus.document(number), number) for number in source.sample(range(corpus.size), count)]

    halves = [(tokens[: len(tokens) // 8 * 4], number) for tokens, number in documents]
    return {
        "an artifact + 200 tokens": [(tokens + noise(source, 200), number) for tokens, number in documents],
        "half an artifact": list(halves),
        "half an artifact + 500 tokens": [(tokens + noise(source, 500), number) for tokens, number in halves],
        "a system prompt + 4,000 tokens": [
            (tokens[:1200] + noise(source, 4000), None) for tokens, _ in documents
        ],
        "4,000 tokens that nothing shares": [(noise(source, 4000), None) for _ in documents],
        "an artifact + 32k tokens": [(t + noise(source, 32_768), n) for t, n in documents[: count // 4]],
        "an artifact + 128k tokens": [(t + noise(source, 131_072), n) for t, n in documents[: count // 4]],
    }


def long_prompts(corpus: Corpus, count: int) -> dict[str, Prompts]:
    """Prompts that hold a whole long artifact: nothing of them can be left out."""
    source = random.Random(3)
    numbers = [number % corpus.size for number in range(count // 4)]
    return {"a 128k artifact + 200 tokens": [(corpus.document(n) + noise(source, 200), n) for n in numbers]}


def measure(lookup: Callable[[bytes], list[str]], asked: Prompts) -> tuple[list[float], list[list[str]]]:
    """(sorted milliseconds, answers in the order asked)."""
    times, answers = [], []
    for tokens, _ in asked:
        begin = time.perf_counter()
        answers.append(lookup(tokens))
        times.append(1000 * (time.perf_counter() - begin))
    return sorted(times), answers


def wrong(corpus: Corpus, numbers: dict[str, int], asked: Prompts, answers: list[list[str]]) -> int:
    """How many of the first answers share less with the prompt than its own document does."""
    count = 0
    for (tokens, number), found in list(zip(asked, answers, strict=True))[:CHECKED]:
        if number is not None:
            document = corpus.document(number)
            shared = common_tokens(tokens, document)
            slack = 0 if shared == len(document) // 4 else BLOCK_TOKENS - 1
            best = max((common_tokens(tokens, corpus.document(numbers[i])) for i in found), default=0)
            count += best < shared - slack
    return count


def row(catalog: Catalog, corpus: Corpus, numbers: dict[str, int], asked: Prompts) -> dict[str, float]:
    """Ask for every prompt of a kind; what the report says of it."""
    times, answers = measure(partial(catalog.candidates, FINGERPRINT, corpus.namespace), asked)
    return {
        "mean_tokens": sum(len(tokens) for tokens, _ in asked) // 4 // len(asked),
        "lookups": len(times),
        "wrong": wrong(corpus, numbers, asked, answers),
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[len(times) * 99 // 100],
        "max_ms": times[-1],
    }


def start_redis(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL), f"redis://127.0.0.1:{port}/0"


def run(options: argparse.Namespace, server: subprocess.Popen[bytes], url: str) -> None:
    """Fill the catalog, ask it, write the report."""
    command = f"python benchmarks/catalog_lookup.py{' --realtime' if options.realtime else ''}"
    report = Report("catalog_lookup", command, "none: times are absolute; the target is p99 under 3 ms")
    corpus = Corpus("bench", options.artifacts, (256, 8192))
    long = Corpus("long", LONG_ARTIFACTS, (131_072, 131_072))
    link = RedisLink(url)
    catalog = Catalog(link, "0" * 32)
    numbers = fill(catalog, corpus)
    used = link.call(lambda client: client.info("memory"))["used_memory"]
    numbers_of_long = fill(catalog, long)
    if options.realtime:
        for process in (0, server.pid):
            os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(10))
    gc.collect()
    gc.freeze()  # the benchmark's own objects are no part of a lookup
    for kind, asked in prompts(corpus, options.lookups).items():
        report.add(prompt=kind, **row(catalog, corpus, numbers, asked))
    for kind, asked in long_prompts(long, options.lookups).items():
        report.add(prompt=kind, **row(catalog, long, numbers_of_long, asked))
    report.write(
        options.out,
        artifacts=options.artifacts,
        long_artifacts=LONG_ARTIFACTS,
        redis_bytes_per_artifact=used // options.artifacts,
        load_average=os.getloadavg(),
        realtime=options.realtime,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of longest-prefix lookups in a large catalog.")
    parser.add_argument("--artifacts", type=int, default=100_000)
    parser.add_argument("--lookups", type=int, default=2_000, help="of each kind of prompt")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--realtime", action="store_true", help="measure at real-time priority (needs root)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start_redis(folder)
        try:
            run(options, server, url)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
