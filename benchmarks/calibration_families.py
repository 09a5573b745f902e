"""What calibration does on models of three families with random weights: errors and divergence, no answers.

    python benchmarks/calibration_families.py

Random weights share little between layers, so this is a hard case; and the tokens are drawn, not written.
Every token is rebuilt: attention of random weights looks everywhere, and no selection suits it. The baseline
is the fixed recipe at the same bytes, in the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from report import Report
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.selection.spec import SelectionSpec

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3 (norms of queries and keys)": (Qwen3ForCausalLM, Qwen3Config),
    "gemma2 (softcap, every other layer sliding)": (Gemma2ForCausalLM, Gemma2Config),
}


def main() -> None:
    """Calibrate each model, print what validation found, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration_families.json"))
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    report = Report(
        "calibration_families", " ".join(["python", *sys.argv]), "recipe: groups of 4, int8, sketch"
    )
    settings = CalibrationSettings(ratios=(8.0, 20.0, 32.0), ratio=20.0, selection=SelectionSpec("dense"))
    sample = [family_document(number, arguments.tokens) for number in range(arguments.documents)]
    for family in FAMILIES:
        found = calibrate(family_model(family), sample, settings)
        for row in found.figures["validation"]:
            kept = ("kl", "agreement", "key_error", "value_error", "ratio", "reason")
            report.add(
                family=family,
                metric=found.figures["weighting"],
                asked=row["asked"],
                step=row["step"],
                **{name: row[name] for name in kept if name in row},
            )
    report.write(arguments.out, documents=arguments.documents, tokens=arguments.tokens)


def family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights; queries and keys larger than they start out, so that attention has something to see."""
    make, config = FAMILIES[family]
    torch.manual_seed(seed)
    window = {"sliding_window": 64} if "sliding" in family else {}
    model = make._from_config(config(**SHAPE, **SPECIAL, **window), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 6
    return model


def family_document(number: int, tokens: int) -> ProbedPrefix:
    """Phrases as a document that is judged by its own end."""
    return ProbedPrefix.of_text(f"document {number}", phrases(number, tokens))


def phrases(number: int, tokens: int) -> list[int]:
    """Phrases of 8 tokens drawn again and again, some oftener than others."""
    generator = torch.Generator().manual_seed(number)
    known = torch.randint(3, 2048, (200, 8), generator=torch.Generator().manual_seed(99))
    often = 1 / torch.arange(1, 201)
    drawn = torch.multinomial(often, tokens // 8, replacement=True, generator=generator)
    return known[drawn].flatten().tolist()


if __name__ == "__main__":
    main()
