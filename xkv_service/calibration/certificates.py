"""Thresholds of fidelity: what is usual for documents like the sample's, to tell others from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from xkv_artifacts.manifest import Fidelity
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


def is_low(fidelity: Fidelity, ratio: float, figures: Mapping[str, Any]) -> bool:
    """Whether an artifact is less faithful than documents of the calibration's sample are at its ratio, or so
    little that answers are lost.

    Args:
        figures: the calibration's; without thresholds nothing is low. Those of before may be above `LOST`.
    """
    known = sorted((one["ratio"], min(LOST, one["kl"])) for one in figures.get("thresholds", ()))
    limits = [kl for at, kl in known if at >= ratio] or [kl for _, kl in known[-1:]]
    return bool(limits) and fidelity.kl > limits[0]


def _kl(
    model: PreTrainedModel, document: ProbedPrefix, spec: CompressionSpec, calibration: Calibration
) -> float:
    fidelity = compress(model, list(document.token_ids), spec, calibration).fidelity
    assert fidelity is not None
    return fidelity.kl
