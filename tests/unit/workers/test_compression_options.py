"""Which options go together, and what spec they make with and without a calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xkv_service.calibration.calibration import Calibration
from xkv_service.errors import InvalidSpec
from xkv_service.spec import CompressionSpec
from xkv_workers.compression_options import CompressionOptions

ID = "3fa9c1" + "0" * 58


def calibration(*rows: tuple[float, str, float]) -> Calibration:
    """One that was validated: (ratio, step, KL)."""
    validation = [{"asked": asked, "step": step, "kl": kl} for asked, step, kl in rows]
    return Calibration((), {}, {"validation": validation}, ID)


def test_without_a_calibration_the_spec_is_the_plain_one() -> None:
    plain = CompressionSpec(base_dtype="int8")
    assert CompressionOptions().spec(None) == plain
    higher = CompressionOptions(ratio=16.0, calibration="none").spec(None)
    assert higher == replace(plain, ratio=16.0, index="derived")
    assert CompressionOptions(basis="document", bits="8").spec(None) == plain


def test_a_calibration_brings_its_bases_mixed_bits_and_no_stored_index() -> None:
    spec = CompressionOptions(ratio=32.0).spec(calibration())
    assert (spec.calibration, spec.basis, spec.factor_dtype) == (ID, "calibrated", "mixed")
    assert (spec.index, spec.ratio) == ("derived", 32.0)
    spec = CompressionOptions(basis="document", bits="4").spec(calibration())
    assert (spec.basis, spec.factor_dtype, spec.ratio) == ("document", "int4", 8)


def test_what_is_left_open_is_what_validation_found_best() -> None:
    found = calibration((8, "bits", 0.1), (8, "calibrated bases, bits", 0.2), (48, "calibrated bases", 0.1))
    spec = CompressionOptions().spec(found)
    assert (spec.basis, spec.factor_dtype) == ("document", "mixed")
    spec = CompressionOptions(ratio=40.0).spec(found)
    assert (spec.basis, spec.factor_dtype) == ("calibrated", "int8")
    spec = CompressionOptions(ratio=40.0, basis="document").spec(found)
    assert (spec.basis, spec.factor_dtype) == ("document", "int8")


@pytest.mark.parametrize(
    "by_hand", [{"rank_k": 384, "rank_v": "full"}, {"group_size": 4}, {"calibration": "none"}]
)
def test_what_is_chosen_by_hand_leaves_no_room_for_a_calibration(by_hand: dict[str, Any]) -> None:
    assert CompressionOptions().may_calibrate
    assert not CompressionOptions(**by_hand).may_calibrate
    for fields in ({"basis": "calibrated"}, {"bits": "mixed"}, {"bits": "4"}):
        with pytest.raises(InvalidSpec, match="there is no calibration"):
            CompressionOptions(**by_hand, **fields)


@pytest.mark.parametrize("by_hand", [{"rank_k": 384, "rank_v": 4}, {"group_size": 2}])
def test_a_named_calibration_and_choices_by_hand_are_refused(by_hand: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="both given"):
        CompressionOptions(calibration="3fa9c1", **by_hand)


def test_options_that_need_a_calibration_say_so_where_there_is_none() -> None:
    with pytest.raises(InvalidSpec, match="basis calibrated and bits 4: the store has no calibration"):
        CompressionOptions(basis="calibrated", bits="4").spec(None)
