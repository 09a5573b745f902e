"""First tokens from a server whose store is about as slow as computing.

    python benchmarks/slow_store.py --out benchmarks/results/slow_store.json

One user asks about one document after the other, each with an artifact (at 8x, with parts, the bundled
calibration) that nobody has in memory, in an object store (moto's) behind a link so slow that a whole
artifact's bytes take `--slower` times as long as computing the document. Every half is on offer, however far
it is from the exact cache. `computed`, the baseline: a server with an empty store of its own, asked the same.
Every row has a server of its own. Seconds are a request's, of one token; that its lookup reads the artifact's
header over the link is in them. `served`: what each document was answered from, in order; computed "at once",
or after a load was waited for "in vain", which are counted.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
from bundled import load, measure_of
from report import Report, command
from traffic_faults import object_store

from xkv_artifacts.store import ArtifactStore
from xkv_service.demo.documents import make_document

STORE = "s3://traffic/store"
OPTIONS = ("--part-kl", "1000", "--min-fidelity", "0", "--stored-tails", "0")
"""Every part is near enough, and nothing else is in the store."""
ROOT = Path(__file__).resolve().parents[1]
sys.path.extend(str(ROOT / folder) for folder in ("tests/e2e", "tests", "."))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slow_store.json"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--slower", type=float, nargs="+", default=[0.4, 0.75, 1.05])
    arguments = parser.parse_args()
    report = Report("slow_store", command(), "computing the prompt")
    with tempfile.TemporaryDirectory() as name, object_store(Path(name)) as link:
        folder = Path(name)
        documents = _documents(folder / "corpus", arguments.tokens, arguments.documents)
        words = [sys.executable, "-m", "xkv_cli", "precompute", "--docs", folder / "corpus", "--parts"]
        subprocess.run([*words, "--ratio", "8", "--store", STORE], check=True)
        with ArtifactStore.open(STORE, os.environ["XKV_REDIS_URL"]) as store:
            sizes = [entry.bytes for entry in store.entries()]
        computed = _asked(folder, documents, "--store", folder / "empty")
        base = median(seconds for seconds, _ in computed)
        report.add(way="computed", **_row(computed, base))
        for slower in arguments.slower:
            link.bytes_s = median(sizes) / (slower * base)
            found = _asked(folder, documents, "--store", STORE, *OPTIONS)
            link.bytes_s = None
            report.add(slower=slower, way="from the store", **_row(found, base))
    report.write(
        arguments.out,
        note="the object store and the link run on the same cores",
        tokens=arguments.tokens,
        documents=arguments.documents,
        whole_bytes=median(sizes),
    )


def _documents(folder: Path, tokens: int, count: int) -> list[str]:
    folder.mkdir()
    measure = measure_of(load())
    texts = [make_document(random.Random(f"slow {one}"), tokens, measure).text for one in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return texts


def _asked(folder: Path, documents: list[str], *options: object) -> list[tuple[float, str]]:
    """Seconds that each document's question took, and what served it."""
    from served import Server

    place = ["--redis", os.environ["XKV_REDIS_URL"]] if STORE in options else []
    server, found = Server(folder, *options, *place), []
    try:
        with httpx.Client(base_url=server.url, timeout=300) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            for text in documents:
                messages = [{"role": "user", "content": f"{text}\n\nWhat does it say?"}]
                body = {"model": model, "messages": messages, "max_tokens": 1}
                began = time.perf_counter()
                answer = client.post("/v1/chat/completions", json=body)
                found.append((time.perf_counter() - began, _served(answer.raise_for_status().json()["xkv"])))
    finally:
        server.stop()
    return found


def _served(told: dict[str, Any]) -> str:
    if told["artifact"] is not None:
        return "whole" if told["part"] is None else "part"
    miss = told["miss"]
    if miss["reason"] != "slow_load":
        return str(miss["reason"])
    return "at once" if miss["detail"].endswith("than loading them") else "in vain"


def _row(found: list[tuple[float, str]], base: float) -> dict[str, float | str]:
    seconds = [one for one, _ in found]
    return {
        "median_s": median(seconds),
        "mean_s": mean(seconds),
        "in_vain": sum(served == "in vain" for _, served in found),
        "served": ", ".join(f"{served} {one:.2f}" for one, served in found),
        "ratio": base / median(seconds),
    }


if __name__ == "__main__":
    main()
