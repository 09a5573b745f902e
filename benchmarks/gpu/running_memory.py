"""More prompts than a GPU holds at once: what becomes of them with and without a budget for what runs.

    python benchmarks/gpu/running_memory.py --out benchmarks/results/gpu/running_memory.json
    python benchmarks/gpu/running_memory.py --tiny --out running_memory.json    # small, checks this script

The engine, one GPU, Llama-2-7B's shapes (a key and a value of every head: 0.5 MB a token) with the MLP of
Llama-3-8B, random weights in bfloat16. Prompts of 16,384 tokens without a stored prefix, as many as would
take 1.3 times the GPU's memory, come at once, each with an answer of 256 tokens; up to 32 run at once, with
up to 2,048 tokens of a prompt in a step, so that all of them would run together. `budget`: "none", the
baseline, lets all in whatever they take, and "default" is the one that an engine has by itself. `answered`:
have their whole answer; `no_memory`: ended for want of it. `seconds`: until the last has its end. `peak_gib`:
most that PyTorch had given out.
"""

from __future__ import annotations

import argparse
import queue
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bundled import load
from compression import LLAMA_8B, TINY, _model
from report import Report, command

from xkv_service.engine.engine import NO_MEMORY, Engine
from xkv_service.engine.messages import Event, Failed, Finished, GenerationRequest
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.settings import GenerationSettings

_PROMPT, _RUNNING, _STEP, _TIMES, _ANSWER = 16384, 32, 2048, 1.3, 256
_TOKEN_BYTES = 2 * 32 * 32 * 128 * 2


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks this script")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fields = TINY if arguments.tiny else {**LLAMA_8B, "num_key_value_heads": 32}
    loaded = replace(load(), model=_model(fields, str(device)))
    prompt, requests = 600, 8
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        prompt, requests = _PROMPT, int(_TIMES * total / (_PROMPT * _TOKEN_BYTES))
    report = Report("running_memory", command(), "no budget")
    for name, budget in (("none", 2**60), ("default", 0)):
        settings = EngineSettings(
            max_running=_RUNNING, step_tokens=_STEP, tail_bytes=0, stored_tail_bytes=0, running_bytes=budget
        )
        report.add(budget=name, **_measure(loaded, settings, prompt, requests))
    report.write(arguments.out, model="Llama-2-7B's shapes, Llama-3-8B's MLP, random weights")


def _measure(loaded: LoadedModel, settings: EngineSettings, prompt: int, requests: int) -> dict[str, object]:
    device = loaded.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with Engine(loaded, settings) as engine:
        began = time.perf_counter()
        asked = [_ask(engine, str(number), prompt) for number in range(requests)]
        ends = [one.get() for one in asked]
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "prompt": prompt,
        "requests": requests,
        "answered": sum(isinstance(end, Finished) for end in ends),
        "no_memory": sum(end == NO_MEMORY for end in ends),
        "seconds": seconds,
        "peak_gib": peak,
    }


def _ask(engine: Engine, name: str, prompt: int) -> queue.SimpleQueue[Event]:
    """Where its end comes."""
    found: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def heard(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            found.put(event)

    ids, settings = torch.randint(3, 90, (prompt,)).tolist(), GenerationSettings(max_new_tokens=_ANSWER)
    engine.submit(GenerationRequest(name, tuple(ids), settings), heard)
    return found


if __name__ == "__main__":
    main()
