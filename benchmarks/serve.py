"""What stored prefixes do for a server's users: first tokens, speed and memory of conversations.

    python benchmarks/serve.py --out benchmarks/results/serve.json

Each cell is a server of its own kind (`xkv serve`, the bundled model) and a client in a process of its own.
Users come at the same moment; all talk about one document, each asks other questions, one after the other.
Baseline: the same server without stored prefixes, which computes every prompt and keeps full caches between
turns. Both may keep every conversation of a run (`--tail-memory`), so that one can be weighed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from report import Report, command

ROOT = Path(__file__).resolve().parents[1]
sys.path.extend(str(ROOT / folder) for folder in ("tests/e2e", "."))


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    if arguments.client:
        asyncio.run(_client(arguments.client, json.loads(arguments.plan.read_text()), arguments.answers))
        return
    report = Report("serve", command(), "the same server without stored prefixes")
    with tempfile.TemporaryDirectory() as folder:
        for shared in arguments.shared:
            _measure(report, Path(folder) / str(shared), shared, arguments)
    options = {name: getattr(arguments, name) for name in ("turns", "rounds", "ratio", "tail_memory")}
    report.write(arguments.out, **options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.json"))
    parser.add_argument("--shared", type=int, nargs="+", default=[2048, 8192], help="tokens of the document")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="documents for each cell")
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--tail-memory", default="6GiB", help="for 43 conversations of 8k, of up to 120 MiB")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(report: Report, folder: Path, shared: int, arguments: argparse.Namespace) -> None:
    from served import Server

    plans = _documents(folder / "corpus", shared, arguments)
    command = [sys.executable, "-m", "xkv_cli", "precompute", "--docs", folder / "corpus"]
    subprocess.run([*command, "--ratio", str(arguments.ratio), "--store", folder / "prefixes"], check=True)
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for kind in ("computed", "prefixes"):
        server = Server(folder, "--store", folder / kind, "--tail-memory", arguments.tail_memory)
        try:
            _ask(server.url, plans[0][:1], folder)  # the first request of all waits for more than its model
            rows[kind] = {
                users: _cell(
                    server.url,
                    [plan[:users] for plan in plans[1:]][number :: len(arguments.sessions)],
                    folder,
                )
                for number, users in enumerate(arguments.sessions)
            }
        finally:
            server.stop()
    for users in arguments.sessions:
        for kind in ("computed", "prefixes"):
            row, base = rows[kind][users], rows["computed"][users]
            report.add(
                shared=shared,
                users=users,
                prompts=kind,
                **row,
                first_token_sooner=base["first_token_s"] / row["first_token_s"],
                tokens_per_s_more=row["tokens_per_s"] / base["tokens_per_s"],
            )


def _documents(folder: Path, shared: int, arguments: argparse.Namespace) -> list[list[Any]]:
    """One document a cell and round, and one to warm up with; of each, what its users ask."""
    from bundled import load, measure_of

    from xkv_service.demo.documents import make_document

    folder.mkdir(parents=True)
    measure = measure_of(load())
    plans = []
    for number in range(1 + arguments.rounds * len(arguments.sessions)):
        document = make_document(Random(f"serve {shared} {number}"), shared, measure)
        (folder / f"{number}.txt").write_text(document.text)
        questions = [(one.question, one.answer) for one in document.questions]
        users = max(arguments.sessions)
        plans.append(
            [
                {"document": document.text, "questions": _share(questions, user, arguments.turns)}
                for user in range(users)
            ]
        )
    return plans


def _share(questions: list[Any], user: int, turns: int) -> list[Any]:
    """A user's questions: where a document has too few, several users ask the same, never at one turn."""
    return [questions[(user * turns + turn) % len(questions)] for turn in range(turns)]


def _cell(url: str, plans: list[list[Any]], folder: Path) -> dict[str, Any]:
    """The median over documents of what the users of each saw."""
    answers = [_ask(url, plan, folder) for plan in plans]
    turns = [turn for one in answers for turn in one["turns"]]
    first = [turn["first_token_s"] for turn in turns if turn["turn"] == 0]
    later = [turn["first_token_s"] for turn in turns if turn["turn"] > 0]
    return {
        "first_token_s": median(first),
        "later_first_token_s": median(later),
        "worst_first_token_s": max(first),
        "tokens_per_s": median(one["tokens"] / one["seconds"] for one in answers),
        "token_gap_ms": 1000 * median(gap for turn in turns for gap in turn["gaps"]),
        "cached": sum(turn["cached"] for turn in turns) / sum(turn["prompt"] for turn in turns),
        "hits": sum(turn["hit"] for turn in turns) / len(turns),
        "right": sum(turn["right"] for turn in turns) / len(turns),
        "mib_a_session": _median_known([one["mib_a_session"] for one in answers]),
        "mib_prefix": median(one["mib_prefix"] for one in answers),
    }


def _ask(url: str, plan: list[Any], folder: Path) -> dict[str, Any]:
    """Let the users of a plan talk, in a process of their own; then look at the server's memory."""
    before = _gauges(url)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, __file__, "--client", url, "--plan", folder / "plan.json"]
    subprocess.run([*map(str, command), "--answers", str(folder / "answers.json")], check=True)
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    time.sleep(2)  # replicas say what they hold once a second
    after = _gauges(url)
    return {
        **found,
        "mib_a_session": mib_a_session(before, after),
        "mib_prefix": (after["prefixes"] - before["prefixes"]) / 2**20,
    }


def mib_a_session(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Memory of one conversation, of all that are kept; None where some left, so that it cannot be told."""
    if after["left"] > before["left"] or after["kept"] < 1 or after["tails"] < 0:
        return None
    return after["tails"] / after["kept"] / 2**20


def _median_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _gauges(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        return gauges_in(answer.read().decode())


def gauges_in(text: str) -> dict[str, float]:
    """What a server holds, of the text of its /metrics; `left`: tails that had to leave its memory."""
    names = {"kept": 'sessions{state="kept"}', "tails": 'resident_bytes{kind="tails"}'}
    names["prefixes"] = 'resident_bytes{kind="prefixes"}'
    found = {key: _number(text, f"xkv_{name} ") for key, name in names.items()}
    left = re.findall(r"^xkv_engine_tails_(?:stored|not_worth|lost_\w+)_total (\S+)$", text, re.MULTILINE)
    return {**found, "left": sum(map(float, left))}


def _number(text: str, start: str) -> float:
    found = re.search(rf"^{re.escape(start)}(\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def _client(url: str, plan: list[Any], answers: Path) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=600)
    model = (await client.models.list()).data[0].id
    began = time.perf_counter()
    users = await asyncio.gather(*(_user(client, model, one) for one in plan))
    seconds = time.perf_counter() - began
    turns = [turn for user in users for turn in user]
    tokens = sum(turn["tokens"] for turn in turns)
    answers.write_text(json.dumps({"seconds": seconds, "tokens": tokens, "turns": turns}))


async def _user(client: Any, model: str, plan: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, str]] = []
    turns = []
    for number, (question, answer) in enumerate(plan["questions"]):
        text = question if messages else f"{plan['document']}\n\n{question}"
        messages.append({"role": "user", "content": text})
        turn = await _turn(client, model, messages)
        messages.append({"role": "assistant", "content": turn["text"]})
        turns.append({**turn, "turn": number, "right": turn["text"] == answer})
    return turns


async def _turn(client: Any, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    began, told, text, usage, served = time.perf_counter(), [], "", None, {}
    options = {"max_tokens": 64, "temperature": 0, "stream_options": {"include_usage": True}}
    stream = await client.chat.completions.create(model=model, messages=messages, stream=True, **options)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            told.append(time.perf_counter())
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
        served = (chunk.model_extra or {}).get("xkv") or served
    gaps = [after - before for before, after in zip(told, told[1:], strict=False)]
    return {
        "text": text,
        "first_token_s": told[0] - began if told else time.perf_counter() - began,
        "gaps": gaps,
        "tokens": usage.completion_tokens,
        "prompt": usage.prompt_tokens,
        "cached": usage.prompt_tokens_details.cached_tokens,
        "hit": served["artifact"] is not None,
    }


if __name__ == "__main__":
    main()
