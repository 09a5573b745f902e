"""Moments in which a token counts by the attention that it receives from the probes.

Not part of the service: `calibration_weights.py --tokens-weighted` measures that it wins nothing
(docs/calibration.md). A group's layers share token factors, so that a token has one weight for all layers:
the mean over layers, heads and queries of its attention, behind a floor. Rows times the weight's root give
the weighted second moments exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import KINDS
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.observed import Observed
from xkv_service.calibration.probes import ProbedPrefix, exact_cache
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.spec import CompressionSpec

SHARES = {"half by attention": 0.5, "nine tenths by attention": 0.9}
"""How much of the weight is attention; the rest is the same for all."""


@torch.no_grad()
def weighted_moments(
    model: PreTrainedModel, found: Observed, documents: Sequence[ProbedPrefix]
) -> Mapping[str, Observed]:
    """`found` with weighted moments, by each of `SHARES`."""
    plain = found.moments
    made = {name: Moments.empty(plain.layers, plain.reach, model.device) for name in SHARES}
    for document in documents:
        exact = prefill(model, torch.tensor(document.token_ids))
        received = _attention(model, exact, document, [layer.index for layer in plain.layers])
        for name, share in SHARES.items():
            weights = 1 - share + share * received / received.mean()
            _observe(made[name], exact, weights.sqrt())
        exact.free()
    return {
        name: Observed(one, found.queries, found.query_tokens, found.planes) for name, one in made.items()
    }


def _attention(
    model: PreTrainedModel, exact: Prefill, document: ProbedPrefix, layers: Sequence[int]
) -> torch.Tensor:
    """Mean attention that each token of the prefix receives: float64 [T]."""
    total = torch.zeros(exact.tokens, dtype=torch.float64, device=exact.device)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for probe in document.probes:
            ids = torch.tensor([probe.token_ids], device=model.device)
            output = model(ids, past_key_values=exact_cache(exact), output_attentions=True)
            for layer in layers:
                total += output.attentions[layer][0, :, :, : exact.tokens].double().mean((0, 1))
    finally:
        model.set_attn_implementation(before)
    return total / (len(document.probes) * len(layers))


def _observe(moments: Moments, exact: Prefill, roots: torch.Tensor) -> None:
    """Add a document whose rows are multiplied by `roots` [T]."""
    behind = slice(CompressionSpec.sink, exact.tokens)
    for kind in KINDS:
        read = exact.keys if kind == "key" else exact.values
        rows = [
            read(layer.index)[behind].flatten(1).double() * roots[behind, None] for layer in moments.layers
        ]
        moments._add(moments.kind(kind), rows)
    moments.tokens += exact.tokens - CompressionSpec.sink
