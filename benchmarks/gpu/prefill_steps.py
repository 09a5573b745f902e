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
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from compression import LLAMA_8B, TINY
from report import Report, command

from xkv_service import enable_xkv
from xkv_service.engine.runners import Runner, make_runner
from xkv_service.sessions.exact import empty_context

_DEFAULT = 2048


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--limits", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks this script")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if arguments.tiny else LLAMA_8B), pad_token_id=0, bos_token_id=1)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    report = Report("prefill_steps", command(), f"the same prompt with {_DEFAULT} tokens a step")
    with torch.no_grad(), enable_xkv(model):
        runner = make_runner(model)
        for prompt in [600] if arguments.tiny else arguments.prompts:
            _measure(report, runner, model, prompt, arguments)
    report.write(arguments.out, rounds=arguments.rounds)


def _measure(
    report: Report, runner: Runner, model: LlamaForCausalLM, prompt: int, arguments: argparse.Namespace
) -> None:
    ids = torch.randint(3, model.config.vocab_size, (prompt,)).tolist()
    found = {}
    for limit in arguments.limits:
        _run(runner, model, ids, limit)
        rounds = [_run(runner, model, ids, limit) for _ in range(arguments.rounds)]
        found[limit] = median(sum(one) for one in rounds), median(max(one) for one in rounds)
    for limit, (whole, longest) in found.items():
        report.add(
            prompt=prompt,
            prefill_tokens=limit,
            first_token_s=whole,
            longest_step_ms=1000 * longest,
            first_token_later=whole / found[_DEFAULT][0],
        )


def _run(runner: Runner, model: LlamaForCausalLM, ids: list[int], limit: int) -> list[float]:
    """Seconds of each step."""
    context, seconds = empty_context(model), []
    for start in range(0, len(ids), limit):
        began = time.perf_counter()
        runner.run([(context, ids[start : start + limit])])[0].argmax().item()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
