"""An hour of a server's traffic in three minutes, with or without a fault; every answer is checked.

    python benchmarks/traffic.py --out benchmarks/results/traffic.json
    python benchmarks/traffic.py --fault kill-replica --out benchmarks/results/traffic_kill_replica.json

Conversations about documents (a few are asked about most), of 1 to 4 turns and many lengths; some users leave
in the middle of an answer, and some requests are bad. Afterwards each whole answer is compared with what the
model gives alone, greedily, with the cache that the server said it used: the same artifact, or an exact one.

Faults: kill-replica kills the engine's process, kill-redis the catalog's, empty-redis kills it and removes
what it saved, corrupt damages 5 % of the blobs (at least one) before the start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from report import Report

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "e2e"))
FAULTS = ("none", "kill-replica", "kill-redis", "empty-redis", "corrupt")
_BAD: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": "hello"},
]


def main() -> None:
    """Run the traffic, check the answers, print a table, write JSON."""
    arguments = _arguments()
    if arguments.client:
        asyncio.run(_client(arguments))
        return
    report = Report("traffic", " ".join(["python", *sys.argv]), "the model alone, with the same cache")
    with tempfile.TemporaryDirectory() as folder:
        report.add(**_measure(Path(folder), arguments))
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/traffic.json"))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=1.0, help="conversations a second")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--stored", type=int, default=20, help="of them, have an artifact")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from served import Server

    documents = _documents(folder, arguments)
    store = folder / "store"
    command = [sys.executable, "-m", "xkv_cli", "precompute", "--docs", folder / "corpus", "--ratio", "8"]
    subprocess.run([*command, "--store", store], check=True)
    if arguments.fault == "corrupt":
        _damage(store, arguments.seed)
    (folder / "plan.json").write_text(json.dumps(documents))
    server = Server(folder, "--store", store, "--prefix-memory", "24MiB", "--tail-memory", "128MiB")
    memory: list[int] = []
    try:
        watching = threading.Event()
        watcher = threading.Thread(target=_watch, args=(server.process.pid, memory, watching))
        watcher.start()
        fault = threading.Timer(arguments.seconds / 3, _strike, (arguments.fault, server.process.pid, store))
        fault.start()
        words = ["--client", server.url, "--plan", folder / "plan.json", "--answers", folder / "answers.json"]
        options = ["--seconds", arguments.seconds, "--rate", arguments.rate, "--seed", arguments.seed]
        subprocess.run([sys.executable, __file__, *map(str, [*words, *options])], check=True)
        fault.cancel()
        watching.set()
        watcher.join()
    finally:
        server.stop()
    answers = json.loads((folder / "answers.json").read_text())
    return {"fault": arguments.fault, **_summary(answers), **_memory(memory), **_check(answers, store)}


def _documents(folder: Path, arguments: argparse.Namespace) -> list[Any]:
    from bundled import load, measure_of

    from xkv_service.demo.documents import make_document

    dice, measure = random.Random(f"traffic {arguments.seed}"), measure_of(load())
    (folder / "corpus").mkdir(parents=True)
    found = []
    for number in range(arguments.documents):
        tokens = dice.choice([600, 1200, 2400, 4800])
        document = make_document(random.Random(f"traffic {arguments.seed} {number}"), tokens, measure)
        if number < arguments.stored:
            (folder / "corpus" / f"{number}.txt").write_text(document.text)
        found.append({"text": document.text, "questions": [one.question for one in document.questions]})
    return found


def _damage(store: Path, seed: int) -> None:
    """Flip a byte in one of twenty blobs, at least one."""
    blobs = sorted(path for path in store.rglob("*.safetensors") if "calibration" not in str(path))
    for path in random.Random(seed).sample(blobs, max(1, len(blobs) // 20)):
        data = bytearray(path.read_bytes())
        data[-len(data) // 3] ^= 0xFF
        path.write_bytes(data)


def _strike(fault: str, server: int, store: Path) -> None:
    if fault == "kill-replica":
        for process in psutil.Process(server).children(recursive=True):
            if "xkv:engine" in " ".join(process.cmdline()):
                process.kill()
    if fault in ("kill-redis", "empty-redis"):
        for process in psutil.process_iter(["name", "cmdline"]):
            if "redis-server" in (process.info["name"] or "") and str(store) in " ".join(
                [*(process.info["cmdline"] or ()), *map(str, _open_files(process))]
            ):
                process.send_signal(signal.SIGKILL)
    if fault == "empty-redis":
        for path in store.rglob("*.rdb"):
            path.unlink()


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [str(process.cwd())]
    except psutil.Error:
        return []


def _watch(server: int, memory: list[int], ending: threading.Event) -> None:
    """Resident bytes of the engine's process, once a second."""
    while not ending.wait(1.0):
        try:
            found = [
                process.memory_info().rss
                for process in psutil.Process(server).children(recursive=True)
                if "xkv:engine" in " ".join(process.cmdline())
            ]
        except psutil.Error:
            continue
        memory.append(max(found, default=0))


def _memory(samples: list[int]) -> dict[str, float]:
    """Of the engine, MiB: medians of the second quarter of the time and of the last."""
    seen = [sample for sample in samples if sample]
    quarter = max(1, len(seen) // 4)
    early, late = seen[quarter : 2 * quarter] or seen, seen[-quarter:]
    return {"mib_early": median(early) / 2**20, "mib_late": median(late) / 2**20}


def _summary(answers: list[Any]) -> dict[str, Any]:
    kinds = Counter(answer["end"] for answer in answers)
    whole = [answer for answer in answers if answer["end"] == "answered"]
    reasons = Counter(answer["xkv"]["miss"]["reason"] for answer in whole if answer["xkv"]["miss"])
    return {
        "requests": len(answers),
        **dict(kinds),
        "from_artifacts": sum(answer["xkv"]["artifact"] is not None for answer in whole),
        "cached": sum(answer["cached"] for answer in whole) / max(1, sum(one["prompt"] for one in whole)),
        "first_token_s": median(answer["first_token_s"] for answer in whole),
        "longest_s": max(answer["seconds"] for answer in answers),
        "misses": dict(reasons),
    }


def _check(answers: list[Any], store: Path) -> dict[str, Any]:
    """Answer every prompt again, alone, with the cache that the server said it used."""
    import torch
    from bundled import load

    from xkv_artifacts.store import ArtifactStore
    from xkv_service import XKVCache, enable_xkv
    from xkv_service.sessions.context import Context
    from xkv_service.sessions.exact import empty_context

    loaded = load()
    torch.set_num_threads(os.cpu_count() or 1)
    contexts: dict[tuple[str | None, int], Context] = {}
    wrong, close, done = [], 0, {}
    with ArtifactStore.open(str(store)) as opened, torch.no_grad(), enable_xkv(loaded.model):
        for answer in sorted(
            (one for one in answers if one["end"] == "answered"), key=lambda one: str(one["messages"])
        ):
            used = (answer["xkv"]["artifact"], answer["xkv"]["prefix_tokens"])
            prompt = loaded.tokenizer.apply_chat_template(
                answer["messages"], add_generation_prompt=True, return_dict=False
            )
            name = (used, tuple(prompt))
            if name not in done:
                if used not in contexts:
                    contexts[used] = (
                        empty_context(loaded.model)
                        if used[0] is None
                        else _context(XKVCache.from_artifact(loaded.model, opened, used[0], tokens=used[1]))
                    )
                context = contexts[used].fork()
                done[name] = _alone(loaded, context, list(prompt))
                if used[0] is None:  # the next prompt is sorted behind it: often of the same document
                    contexts[used] = context
            text, margins = done[name]
            if text != answer["text"]:
                tie = min(margins) < 1e-3
                close += tie
                if not tie:
                    wrong.append({"text": answer["text"], "alone": text, "margin": min(margins)})
    for one in wrong[:5]:
        print("WRONG", one)
    return {
        "checked": sum(one["end"] == "answered" for one in answers),
        "wrong": len(wrong),
        "ties": close,
    }


def _context(cache: Any) -> Any:
    from xkv_service.sessions.context import Context

    return Context(cache.prefix.model, cache, cache.prefix.token_ids.tolist())


def _alone(loaded: Any, context: Any, prompt: list[int]) -> tuple[str, list[float]]:
    """The greedy answer, and by how much each of its tokens was the likeliest."""
    from xkv_service.modeling.tokens import end_tokens
    from xkv_service.sessions.answer import common_tokens

    ends, chosen, margins = end_tokens(loaded.model, loaded.tokenizer), [], []
    context.rewind(min(common_tokens(context.ids, prompt), len(prompt) - 1))
    logits = context.advance(prompt[len(context.ids) :])
    while len(chosen) < 48:
        best = logits.topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        if token in ends:
            break
        chosen.append(token)
        logits = context.advance([token])
    return loaded.tokenizer.decode(chosen, skip_special_tokens=True), margins


async def _client(arguments: argparse.Namespace) -> None:
    from openai import AsyncOpenAI

    documents, dice = json.loads(arguments.plan.read_text()), random.Random(arguments.seed)
    client = AsyncOpenAI(base_url=f"{arguments.client}/v1", api_key="-", max_retries=0, timeout=120)
    model = (await client.models.list()).data[0].id
    weights = [1 / (rank + 1) for rank in range(len(documents))]
    talks, answers, end = [], [], time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        document = dice.choices(documents, weights)[0]
        talks.append(
            asyncio.create_task(_talk(client, model, document, random.Random(dice.random()), answers))
        )
        await asyncio.sleep(dice.expovariate(arguments.rate))
    await asyncio.gather(*talks)
    arguments.answers.write_text(json.dumps(answers))


async def _talk(client: Any, model: str, document: Any, dice: random.Random, answers: list[Any]) -> None:
    if dice.random() < 0.08:
        answers.append(await _bad(client, model, dice))
        return
    messages: list[dict[str, str]] = []
    for _ in range(dice.choice([1, 1, 2, 3, 4])):
        question = dice.choice(document["questions"])
        content = question if messages else f"{document['text']}\n\n{question}"
        messages = [*messages, {"role": "user", "content": content}]
        answer = await _request(client, model, messages, leave=dice.random() < 0.1)
        answers.append(answer)
        if answer["end"] != "answered":
            return
        messages = [*messages, {"role": "assistant", "content": answer["text"]}]
        await asyncio.sleep(dice.expovariate(2.0))


async def _bad(client: Any, model: str, dice: random.Random) -> dict[str, Any]:
    import httpx

    began = time.monotonic()
    async with httpx.AsyncClient(timeout=60) as plain:
        url = f"{str(client.base_url).rstrip('/')}/chat/completions"
        answer = await plain.post(url, json={"model": model, **dice.choice(_BAD)})
    end = "refused" if 400 <= answer.status_code < 500 and answer.json()["error"]["message"] else "broken"
    return {"end": end, "seconds": time.monotonic() - began}


async def _request(client: Any, model: str, messages: list[dict[str, str]], *, leave: bool) -> dict[str, Any]:
    """One request and how it ended: answered, left, error (a clean one), hang, or broken."""
    import openai

    began, first, text, last, pieces = time.monotonic(), None, "", None, 0
    found: dict[str, Any] = {"messages": messages}
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            max_tokens=48,
            temperature=0,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            last = chunk
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic()
                text += chunk.choices[0].delta.content
                pieces += 1
                if leave and pieces == 3:
                    await stream.close()
                    return {**found, "end": "left", "seconds": time.monotonic() - began}
    except openai.APITimeoutError:
        return {**found, "end": "hang", "seconds": time.monotonic() - began}
    except openai.APIError as error:  # with a status, or an event of the stream that says what went wrong
        return {**found, "end": "error", "error": str(error)[:200], "seconds": time.monotonic() - began}
    if last is None or last.usage is None:
        return {**found, "end": "broken", "seconds": time.monotonic() - began}
    return {
        **found,
        "end": "answered",
        "text": text,
        "seconds": time.monotonic() - began,
        "first_token_s": (first or time.monotonic()) - began,
        "prompt": last.usage.prompt_tokens,
        "cached": last.usage.prompt_tokens_details.cached_tokens,
        "xkv": last.model_extra["xkv"],
    }


if __name__ == "__main__":
    main()
