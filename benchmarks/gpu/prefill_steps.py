"""What a step's limit on prompts costs on a GPU: a Llama-3.1-8B-shaped model, random weights and tokens.

python benchmarks/gpu/prefill_steps.py --out OUT/prefill_steps.json
python benchmarks/gpu/prefill_steps.py --tiny --out tiny.json                       # small, on a CPU

One prompt alone, run by the engine's own runner in pieces of `prefill_tokens`, into an exact cache. Medians
of the rounds: seconds to its first token, and of its longest step, for which whoever comes meanwhile waits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from compression import LLAMA_8B, TINY, _model
from report import Report, command

from xkv_service import enable_xkv
from xkv_service.engine.runners import Runner, make_runner
from xkv_service.sessions.exact import empty_context

_PROMPTS = (8192, 32768, 65536)
_LIMITS, _DEFAULT = (512, 1024, 2048, 4096, 8192), 2048
_ROUNDS = 3


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks this script")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(TINY if arguments.tiny else LLAMA_8B, str(device))
    report = Report("prefill_steps", command(), f"the same prompt with {_DEFAULT} tokens a step")
    with torch.no_grad(), enable_xkv(model):
        runner = make_runner(model)
        for prompt in [600] if arguments.tiny else _PROMPTS:
            _measure(report, runner, model, prompt)
    report.write(arguments.out, rounds=_ROUNDS)


def _measure(report: Report, runner: Runner, model: PreTrainedModel, prompt: int) -> None:
    ids = torch.randint(3, model.config.vocab_size, (prompt,)).tolist()
    found = {}
    for limit in _LIMITS:
        _run(runner, model, ids, limit)
        rounds = [_run(runner, model, ids, limit) for _ in range(_ROUNDS)]
        found[limit] = median(sum(one) for one in rounds), median(max(one) for one in rounds)
    for limit, (whole, longest) in found.items():
        report.add(
            prompt=prompt,
            prefill_tokens=limit,
            first_token_s=whole,
            longest_step_ms=1000 * longest,
            first_token_later=whole / found[_DEFAULT][0],
        )


def _run(runner: Runner, model: PreTrainedModel, ids: list[int], limit: int) -> list[float]:
    """Seconds of each step."""
    context, seconds = empty_context(model), []
    for start in range(0, len(ids), limit):
        began = time.perf_counter()
        runner.run([(context, ids[start : start + limit])])[0].argmax().item()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
