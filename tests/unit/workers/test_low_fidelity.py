"""Which artifacts are compressed again, and how."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xkv_artifacts.manifest import Fidelity
from xkv_service.calibration.calibration import Calibration
from xkv_service.errors import InvalidSpec
from xkv_service.spec import CompressionSpec
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.low_fidelity import Standard, retry_specs
from xkv_workers.messages import Stored
from xkv_workers.request import Request

SPEC = CompressionSpec(
    ratio=32.0, calibration="a" * 64, basis="calibrated", factor_dtype="mixed", index="derived"
)
CALIBRATION = Calibration((), {}, {"thresholds": [{"ratio": 32.0, "worst": 0.005, "kl": 0.015}]}, "a" * 64)


def fidelity(agreement: float, kl: float) -> Fidelity:
    return Fidelity(top1_agreement=agreement, kl=kl, positions=64, key_error=(0.1,), value_error=(0.1,))


def test_other_tries_have_half_the_ratio_with_own_and_with_shared_bases() -> None:
    own, shared = retry_specs(replace(SPEC, factor_dtype="int8"))
    assert (own.ratio, own.basis, own.factor_dtype, own.base_dtype) == (16, "document", "int8", "int8")
    assert (shared.ratio, shared.basis, shared.factor_dtype) == (16, "calibrated", "mixed")
    assert own.calibration == shared.calibration == SPEC.calibration
    assert shared.base_dtype is None
    assert [one.ratio for one in retry_specs(CompressionSpec(ratio=1.5))] == [1]


def test_the_calibration_says_what_is_low() -> None:
    standard = Standard(calibration=CALIBRATION)
    assert not standard.is_low(fidelity(0.5, 0.015), 32.0)
    assert standard.is_low(fidelity(1.0, 0.016), 32.0)
    asks = Standard(min_fidelity=0.9, calibration=CALIBRATION)
    assert asks.is_low(fidelity(0.89, 0.0), 32.0), "less than is asked for"


@pytest.mark.parametrize("calibration", [None, Calibration((), {}, {}, "a" * 64)])
def test_without_thresholds_agreement_says(calibration: Calibration | None) -> None:
    standard = Standard(calibration=calibration)
    assert standard.is_low(fidelity(0.89, 0.0), 32.0)
    assert not standard.is_low(fidelity(0.9, 9.0), 32.0)
    assert not Standard(min_fidelity=0.5, calibration=calibration).is_low(fidelity(0.6, 0.0), 32.0)


def test_stored_artifacts_fall_short_as_new_ones_do() -> None:
    stored = Stored("a" * 64, 10, 100, 10, fidelity=0.95, kl=0.0421, low=True)
    assert Standard("keep").shortfall(stored) is None
    assert Standard("retry").shortfall(stored) is None, "nothing better was found"
    assert Standard("fail").shortfall(replace(stored, low=False)) is None
    reason = Standard("fail").shortfall(stored)
    assert reason is not None and "0.950 (KL 0.0421), which is low" in reason
    reason = Standard("keep", min_fidelity=0.96).shortfall(stored)
    assert reason is not None and "below 0.96" in reason


def test_ranks_cannot_be_halved() -> None:
    with pytest.raises(InvalidSpec, match="ranks were given"):
        Request((), "store", CompressionOptions(rank_k=4, rank_v=4), on_low_fidelity="retry")
