"""Subspace iteration of a document's own bases from a calibration's, against a random start.

    python benchmarks/warm_start.py --out benchmarks/results/warm_start.json

Bases are made of other documents as `xkv calibrate` makes them (all features alike), then one more is
factored from either start with 0 to 4 filter steps. `excess_%` is the error |X - AB| over the least possible
at the rank, which an eigensolver finds; times are of the iteration. Models: the bundled one (768 features in
a group of four layers) and a wider one with random weights (4,096), both in float32, documents of the demo's
generator, and for the wide one drawn phrases.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bundled import document_ids, load
from calibration_families import phrases
from report import Report, command
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xkv_service import CompressionSpec
from xkv_service.compression import rotary_tables
from xkv_service.factorization.features import features_of
from xkv_service.factorization.gram import accumulate_gram, gram_dtype
from xkv_service.factorization.ranks import size_of
from xkv_service.factorization.subspace import OVERSAMPLING, precise_products, subspace_iteration
from xkv_service.prefilling.prefill import prefill

WIDE = LlamaConfig(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
    max_position_embeddings=16384,
)
STEPS = range(5)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/warm_start.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=12, help="that the calibration is made of")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the median is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "warm_start", command(), "the eigensolver's error; times of four steps from a random start"
    )
    bundled = load()
    _measure(
        report,
        "bundled, 768 features",
        bundled.model.to(arguments.device),
        [document_ids(bundled, arguments.tokens, seed) for seed in range(arguments.documents + 1)],
        (32, 64, 128, 192),
        arguments.repeats,
    )
    _measure(
        report,
        "random weights, 4096 features",
        _wide().to(arguments.device),
        [torch.tensor(phrases(seed, arguments.tokens)) for seed in range(arguments.documents + 1)],
        (64, 128, 256, 512),
        arguments.repeats,
    )
    report.write(
        arguments.out, tokens=arguments.tokens, documents=arguments.documents, device=arguments.device
    )


def _wide() -> PreTrainedModel:
    """Random weights; queries and keys larger than they start out, so that attention has something to see."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(WIDE, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 6
    return model


def _measure(
    report: Report,
    name: str,
    model: PreTrainedModel,
    documents: list[torch.Tensor],
    ranks: tuple[int, ...],
    repeats: int,
) -> None:
    sums: list[torch.Tensor] = []
    for ids in documents[:-1]:
        grams = list(_grams(model, ids))
        sums = [one + more for one, more in zip(sums, grams, strict=True)] if sums else grams
    for kind, total, gram in zip(("keys", "values"), sums, _grams(model, documents[-1]), strict=True):
        calibrated = torch.linalg.eigh(total.double()).eigenvectors.flip(-1)
        energies = torch.linalg.eigvalsh(gram.double()).flip(-1)
        for rank in ranks:
            best = float(energies[rank:].sum().clamp_min(0).sqrt())
            shared = calibrated[:, :rank]
            report.add(
                model=name, kind=kind, rank=rank, start="calibrated, as it is", **_excess(gram, shared, best)
            )
            # As many directions as a calibration may lack: those of `rank` alone, the rest random.
            others = torch.randn(len(gram), OVERSAMPLING, generator=torch.Generator().manual_seed(0))
            filled = torch.cat([shared, others.to(shared)], 1)
            starts = {"random": None, "calibrated": calibrated[None], "calibrated, rank only": filled[None]}
            for start_name, start in starts.items():
                for steps in STEPS:
                    run = partial(subspace_iteration, gram[None], rank, start, steps=steps)
                    with precise_products():
                        seconds, found = _timed(run, gram.device, repeats)
                    row = _excess(gram, found[0][0], best)
                    report.add(
                        model=name,
                        kind=kind,
                        rank=rank,
                        start=start_name,
                        steps=steps,
                        seconds=seconds,
                        **row,
                    )


def _grams(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """XᵀX of the first group's keys and of its values."""
    exact = prefill(model, ids)
    try:
        use = rotary_tables(exact)[1]
        layout = size_of(exact.layout, exact.tokens, CompressionSpec(rank_k=8, rank_v=8), use).groups[0]
        for part in features_of(exact, layout):
            yield accumulate_gram(
                part.read,
                part.widths,
                (0, exact.tokens),
                chunk_tokens=part.chunk_tokens,
                dtype=part.product_dtype,
                device=exact.device,
            ).to(gram_dtype(part.product_dtype))
    finally:
        exact.free()


def _excess(gram: torch.Tensor, basis: torch.Tensor, best: float) -> dict[str, float]:
    """By how much the error of an orthonormal basis [W, r] is larger than the least one."""
    wide = gram.double()
    lost = wide.diagonal().sum() - (basis * (wide @ basis)).sum()
    return {"excess_%": 100 * (float(lost.clamp_min(0).sqrt()) / best - 1)}


def _timed(
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]], device: torch.device, repeats: int
) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times), found


if __name__ == "__main__":
    main()
