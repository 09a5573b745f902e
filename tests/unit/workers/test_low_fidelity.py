"""Which artifacts are compressed again, and how."""

from __future__ import annotations

import pytest

from xkv_artifacts.manifest import Fidelity
from xkv_service.calibration.calibration import Calibration
from xkv_service.errors import InvalidSpec
from xkv_service.spec import CompressionSpec
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.low_fidelity import is_low, retry_spec
from xkv_workers.request import Request

SPEC = CompressionSpec(
    ratio=32.0, calibration="a" * 64, basis="calibrated", factor_dtype="mixed", index="derived"
)
CALIBRATION = Calibration((), {}, {"thresholds": [{"ratio": 32.0, "worst": 0.01, "kl": 0.03}]}, "a" * 64)


def fidelity(agreement: float, kl: float) -> Fidelity:
    return Fidelity(top1_agreement=agreement, kl=kl, positions=64, key_error=(0.1,), value_error=(0.1,))


def test_another_try_has_half_the_ratio_and_bases_of_its_own() -> None:
    again = retry_spec(SPEC)
    assert (again.ratio, again.basis, again.calibration) == (16, "document", SPEC.calibration)
    assert again.base_dtype == "int8"
    assert retry_spec(CompressionSpec(ratio=1.5)).ratio == 1


def test_the_calibration_says_what_is_low() -> None:
    assert not is_low(fidelity(0.5, 0.03), SPEC, CALIBRATION, 0.0)
    assert is_low(fidelity(1.0, 0.031), SPEC, CALIBRATION, 0.0)
    assert is_low(fidelity(0.89, 0.0), SPEC, CALIBRATION, 0.9), "less than is asked for"


@pytest.mark.parametrize("calibration", [None, Calibration((), {}, {}, "a" * 64)])
def test_without_thresholds_agreement_says(calibration: Calibration | None) -> None:
    assert is_low(fidelity(0.89, 0.0), SPEC, calibration, 0.0)
    assert not is_low(fidelity(0.9, 9.0), SPEC, calibration, 0.0)
    assert not is_low(fidelity(0.6, 0.0), SPEC, calibration, 0.5)


def test_ranks_cannot_be_halved() -> None:
    with pytest.raises(InvalidSpec, match="ranks were given"):
        Request((), "store", CompressionOptions(rank_k=4, rank_v=4), on_low_fidelity="retry")
