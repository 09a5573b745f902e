"""Thresholds of fidelity: what is usual for documents like the sample's, to tell others from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.calibration.limits import LEAST_KL, LOST, TIMES_WORST
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.compression import compress
from xkv_service.errors import RatioUnreachable
from xkv_service.spec import CompressionSpec


def fidelity_thresholds(
    model: PreTrainedModel, held: Sequence[ProbedPrefix], ratios: Sequence[float], calibration: Calibration
) -> list[dict[str, float]]:
    """For each ratio that can be reached: the divergence above which a document is unlike the sample, or its
    answers are lost like those of the sample itself. A ratio at which predictions break altogether has none.

    Measured as an artifact's own fidelity is (`fidelity.certify`), on documents the bases were not made from.
    """
    found = []
    for ratio in ratios:
        spec = best_spec(ratio, calibration)
        try:
            worst = max(_kl(model, one, spec, calibration) for one in held)
        except RatioUnreachable:
            continue
        if math.isfinite(worst):
            limit = min(LOST, max(LEAST_KL, TIMES_WORST * worst))
            found.append({"ratio": ratio, "worst": worst, "kl": limit})
    return found


def _kl(
    model: PreTrainedModel, document: ProbedPrefix, spec: CompressionSpec, calibration: Calibration
) -> float:
    fidelity = compress(model, list(document.token_ids), spec, calibration).fidelity
    assert fidelity is not None
    return fidelity.kl
