"""What each decision of a calibration does to models of random weights: three families, and latent attention.

    python benchmarks/calibration_families.py

Errors of reconstruction and divergence of predictions, no answers: random weights know none. They share
little between layers, so this is a hard case; and the tokens are drawn, not written. Every token is rebuilt,
since attention of random weights looks everywhere and no selection suits it; so no step but the first stores
an index. A calibration is chosen on documents held out of its sample, and everything is measured on others.
Of latent attention (MLA), whose factors are its index, selecting by them is measured against exact scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from report import Report, command
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xkv_service.calibration.calibrate import decide, split
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.folds import Folds
from xkv_service.calibration.observed import Observed, calibrated_layers, observe_document, reach_of
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.tolerance import no_tolerances
from xkv_service.calibration.validation import Candidate, Outcome, validate
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two window layers of eight, of few tokens: what is exact leaves room for 32x.
WINDOWS = {"sliding_window": 32, "layer_types": [*["full_attention"] * 3, "sliding_attention"] * 2}
# As in DeepSeek-V3 a ninth of what is cached is a rotated key, kept exact; no experts.
LATENTS = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "first_k_dense_replace": 8,
}
FAMILIES = {
    "llama": ("llama", {}),
    "qwen3 (norms of queries and keys)": ("qwen3", {}),
    "gemma2 (softcap, 2 of 8 layers sliding)": ("gemma2", WINDOWS),
    "deepseek_v3 (latents)": ("deepseek_v3", LATENTS),
}
RATIOS = (8.0, 20.0, 32.0)
DENSE = SelectionSpec("dense")
_SHARPENED = ("q_proj.weight", "k_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")


def main() -> None:
    """Calibrate each model, print what each decision does to new documents, write JSON as it goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration_families.json"))
    parser.add_argument("--documents", type=int, default=12, help="of the sample; every fourth is held out")
    parser.add_argument("--new", type=int, default=4, help="documents to measure on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    arguments = parser.parse_args()
    report = Report(
        "calibration_families",
        command(),
        "the paper's recipe without its index: groups of 4, bfloat16 factors",
    )
    count = arguments.documents
    documents = [family_document(number, arguments.tokens) for number in range(count + arguments.new)]
    report.keep(
        arguments.out, documents=count, new_documents=arguments.new, tokens=len(documents[0].token_ids)
    )
    for family in arguments.families:
        _measure(report, family, documents[:count], documents[count:])
    report.write(arguments.out)


def _measure(
    report: Report, family: str, sample: Sequence[ProbedPrefix], new: Sequence[ProbedPrefix]
) -> None:
    model = family_model(family)
    layers = calibrated_layers(inspect_loaded(model).layout)
    usual = CalibrationSettings.of(layers)
    latent = layers[0].kind == "latent"
    asked = (3.0, *usual.ratios[:3]) if latent else RATIOS
    settings = replace(usual, ratio=asked[-1], ratios=(), selection=DENSE)
    used, held = split(sample, settings)
    found = Observed.nothing(model, reach_of(inspect_loaded(model).layout, settings))
    for document in used:
        observe_document(model, document, found)
    made = decide(model, Folds([found], len(used)), used, held, settings)
    plain = Candidates(model, found, no_tolerances(found.moments), settings)
    fixed = plain.calibration("plain", plain.fixed_groups())
    grouped = plain.calibration("plain", plain.best_groups("plain"))
    about = {"family": family, "metric": made.figures["weighting"], "groups": made.figures["groups"]}
    for ratio in asked:
        recipe = CompressionSpec(ratio=ratio, factor_dtype="bfloat16", index="landmark")
        own = {"basis": "document", "factor_dtype": "int8", "index": "none"}
        steps = [
            Candidate("the paper's recipe", recipe),
            Candidate("without its index", replace(recipe, index="none")),
            Candidate("+ 8 bits", replace(recipe, index="none", factor_dtype="int8")),
            Candidate("+ ranks", calibrated_spec(ratio, fixed, **own), fixed),
            Candidate("+ groups", calibrated_spec(ratio, grouped, **own), grouped),
            Candidate("+ weights", calibrated_spec(ratio, made, **own), made),
            Candidate("+ bits", calibrated_spec(ratio, made, **{**own, "factor_dtype": "mixed"}), made),
            Candidate("+ shared bases", calibrated_spec(ratio, made, index="none"), made),
        ]
        outcomes = validate(model, new, steps, DENSE)
        baseline = outcomes["without its index"].kl
        for step, outcome in outcomes.items():
            report.add(**about, asked=ratio, step=step, **_row(outcome, baseline))
        for selector in ("auto", "exact") if latent else ():
            name = f"shared bases, 1/16 selected by {'the index' if selector == 'auto' else selector}"
            found_by = validate(model, new, [replace(steps[-1], name=name)], SelectionSpec(selector))[name]
            report.add(**about, asked=ratio, step=name, **_row(found_by, baseline))


def _row(outcome: Outcome, baseline: float) -> dict[str, object]:
    row = outcome.as_dict()
    kept = ("kl", "kl_error", "agreement", "key_error", "value_error", "ratio", "reason")
    better = {} if "kl" not in row else {"times_less_kl": baseline / max(row["kl"], 1e-12)}
    return {name: row[name] for name in kept if name in row} | better


def family_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights; queries and keys larger than they start out, so that attention has something to see."""
    model_type, fields = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(_SHARPENED):
                weight *= 6
    return model


def family_document(number: int, tokens: int) -> ProbedPrefix:
    """A document of `phrases`."""
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
