"""What the engine's step limits cost: stalls of running streams, first tokens, and memory of a prefill.

    python benchmarks/engine_steps.py --out benchmarks/results/engine_steps.json

The bundled model on one CPU thread, in this process. Seconds are processor time of the engine's thread, so
that other programs on the machine change little. Without end tokens: streams run as long as they are needed.
`step_tokens`: some streams run when a prompt comes; baseline is the same prompt on an idle engine, and a step
of the streams alone. `prefill_tokens`: one long prompt on an idle engine; baseline is the first value. An
option without values leaves its part out.

    python benchmarks/engine_steps.py --step-tokens --prefill-tokens 512 2048 --long-rounds 0 \\
        --questions 20 --out benchmarks/results/engine_questions.json

`questions`: short prompts that come one after the other while a long one is computed, with each of
`prefill_tokens`, `rounds` times; baseline is either alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bundled import document_ids, load
from report import Report, command

from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import Delta, Event, Failed, Finished, GenerationRequest, Started
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.settings import GenerationSettings

_NAMES = itertools.count()
_WARM_STEPS = 24
_QUESTION, _ANSWER = 16, 8
"""Tokens of a question and of its answer."""


class Asked:
    """One request, and when on the engine's thread its tokens came."""

    def __init__(self, engine: Engine, ids: list[int], answer_tokens: int) -> None:
        self.began, self.times, self.done = _seconds_of(engine), list[float](), threading.Event()
        name, settings = str(next(_NAMES)), GenerationSettings(max_new_tokens=answer_tokens)
        self.cancel = engine.submit(GenerationRequest(name, tuple(ids), settings, namespace=name), self._note)

    @property
    def first_token_s(self) -> float:
        """From the submission to the first token."""
        return self.times[0] - self.began

    def _note(self, event: Event) -> None:
        if isinstance(event, Started | Delta):
            self.times.append(time.thread_time())
        elif isinstance(event, Finished | Failed):
            assert not isinstance(event, Failed), event
            self.done.set()


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load()
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    report = Report("engine_steps", command(), "the prompt on an idle engine; the first prefill_tokens")
    _ask_alone(loaded, EngineSettings(), 256, 0)  # what only the first forwards of a process take
    rounds = range(arguments.rounds)
    alone = [
        _ask_alone(loaded, EngineSettings(), arguments.prompt, seed)[0]
        for seed in rounds
        if arguments.step_tokens
    ]
    for limit in arguments.step_tokens:
        settings = EngineSettings(step_tokens=limit)
        found = [_join(loaded, settings, arguments.streams, arguments.prompt, seed) for seed in rounds]
        usual, stalls = ([gap for one in found for gap in one[index]] for index in (1, 2))
        first = median(one[0] for one in found)
        report.add(
            step_tokens=limit,
            streams=arguments.streams,
            prompt=arguments.prompt,
            gap_ms=1000 * median(usual),
            stall_p50_ms=1000 * median(stalls),
            stall_p95_ms=1000 * _percentile(stalls, 0.95),
            stalls=len(stalls) // arguments.rounds,
            first_token_s=first,
            first_token_later=first / median(alone),
        )
    long = {}
    for limit in arguments.prefill_tokens if arguments.long_rounds else ():
        settings = EngineSettings(prefill_tokens=limit)
        runs = [
            _ask_alone(loaded, settings, arguments.long_prompt, seed) for seed in range(arguments.long_rounds)
        ]
        long[limit] = median(run[0] for run in runs), max(run[1] for run in runs)
    for limit, (first, peak) in long.items():
        report.add(
            prefill_tokens=limit,
            prompt=arguments.long_prompt,
            first_token_s=first,
            first_token_later=first / next(iter(long.values()))[0],
            peak_mib=peak / 2**20,
        )
    for limit in arguments.prefill_tokens if arguments.questions else ():
        settings = EngineSettings(prefill_tokens=limit)
        beside = _beside_a_long_prompt(loaded, settings, arguments.questions, arguments.long_prompt, rounds)
        report.add(prefill_tokens=limit, **beside)
    rounds_run = {"rounds": arguments.rounds} if arguments.step_tokens or arguments.questions else {}
    if arguments.prefill_tokens and arguments.long_rounds:
        rounds_run["long_rounds"] = arguments.long_rounds
    report.write(arguments.out, **rounds_run, seconds="processor time of the engine's thread")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_steps.json"))
    parser.add_argument("--step-tokens", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--prefill-tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that comes in between")
    parser.add_argument("--long-prompt", type=int, default=8192)
    parser.add_argument(
        "--questions", type=int, default=0, help="that come while the long prompt is computed"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-rounds", type=int, default=1)
    return parser.parse_args()


def _join(
    loaded: LoadedModel, settings: EngineSettings, streams: int, prompt: int, seed: int
) -> tuple[float, list[float], list[float]]:
    """The newcomer's first token, a stream's gaps before it came, and until its first token (seconds)."""
    ids = document_ids(loaded, prompt, seed).tolist()
    with Engine(loaded, settings) as engine:
        running = [Asked(engine, ids[64 * number :][:64], 2000) for number in range(1, streams + 1)]
        while min(len(one.times) for one in running) < _WARM_STEPS:
            time.sleep(0.01)
        newcomer = Asked(engine, ids, 1)
        newcomer.done.wait()
        for one in running:
            one.cancel()
            one.done.wait()
    watched, end = running[0].times, newcomer.times[0]
    gaps = list(zip(watched, watched[1:], strict=False))
    before = [after - at for at, after in gaps if after <= newcomer.began][_WARM_STEPS // 2 :]
    until = [after - at for at, after in gaps if after > newcomer.began and at < end]
    return newcomer.first_token_s, before, until


def _ask_alone(loaded: LoadedModel, settings: EngineSettings, prompt: int, seed: int) -> tuple[float, int]:
    """First token (seconds) of a prompt on an idle engine, and the bytes that it took at its peak."""
    ids = document_ids(loaded, prompt, seed).tolist()
    with Engine(loaded, settings) as engine:
        while not _is_idle(engine):
            time.sleep(0.01)
        before = _reset_peak()
        asked = Asked(engine, ids, 1)
        asked.done.wait()
        return asked.first_token_s, _status("VmHWM") - before


def _beside_a_long_prompt(
    loaded: LoadedModel, settings: EngineSettings, questions: int, prompt: int, rounds: range
) -> dict[str, Any]:
    """First tokens (seconds) of questions that come while a long prompt is computed, and of that.

    Where no answer was whole before the long prompt, there are no figures of questions.
    """
    alone = median(_ask_alone(loaded, settings, _QUESTION, seed)[0] for seed in rounds)
    long_alone = median(_ask_alone(loaded, settings, prompt, seed)[0] for seed in rounds)
    found, long_s = list[float](), list[float]()
    for seed in rounds:
        ids = document_ids(loaded, prompt, seed).tolist()
        with Engine(loaded, settings) as engine:
            long = Asked(engine, ids, 1)
            while engine.state().counters.get("steps", 0) < 1:
                time.sleep(0.01)
            for number in range(1, questions + 1):
                one = Asked(engine, ids[_QUESTION * number :][:_QUESTION], _ANSWER)
                one.done.wait()
                if long.done.is_set():
                    break
                found.append(one.first_token_s)
            long.done.wait()
        long_s.append(long.first_token_s)
    return {
        "questions": len(found),
        "prompt": prompt,
        "question_s": median(found) if found else None,
        "question_most_s": max(found, default=None),
        "question_alone_s": alone,
        "long_s": median(long_s),
        "long_later": median(long_s) / long_alone,
    }


def _is_idle(engine: Engine) -> bool:
    """Whether its thread has nothing to do (any more): it tries the model when it starts."""
    before = _seconds_of(engine)
    time.sleep(0.2)
    return _seconds_of(engine) == before


def _seconds_of(engine: Engine) -> float:
    """Processor time of the engine's thread."""
    ident = engine._thread.ident
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def _reset_peak() -> int:
    """Give free memory back, forget the peak; bytes that are resident now (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _percentile(values: list[float], share: float) -> float:
    found: Any = torch.quantile(torch.tensor(values), share).item()
    return float(found)


if __name__ == "__main__":
    main()
