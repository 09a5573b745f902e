"""`CompressionSpec`: defaults, refusals, canonical form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xkv_artifacts.keys import artifact_id
from xkv_service.errors import InvalidSpec
from xkv_service.spec import CompressionSpec


def test_the_default_is_eight_times_in_groups_of_four() -> None:
    spec = CompressionSpec()
    assert (spec.ratio, spec.group_size, spec.key_share, spec.index) == (8.0, 4, 0.4, "sketch")


def test_ranks_replace_the_ratio() -> None:
    spec = CompressionSpec(rank_k=384, rank_v="full")
    assert (spec.ratio, spec.rank_k, spec.rank_v) == (None, 384, "full")


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.5},
        {"ratio": float("nan")},
        {"ratio": float("inf")},
        {"rank_k": 4},
        {"rank_k": 4, "rank_v": 4, "ratio": 8},
        {"rank_k": 0, "rank_v": 4},
        {"rank_k": "half", "rank_v": 4},
        {"rank_k": 1.5, "rank_v": 4},
        {"rank_k": 4, "rank_v": True},
        {"rank_k": [4], "rank_v": 4},
        {"ratio": "8"},
        {"ratio": True},
        {"key_share": "x"},
        {"key_share": True},
        {"key_share": 1.0},
        {"group_size": 0},
        {"group_size": 2.5},
        {"group_size": True},
        {"sink": -1},
        {"landmark_chunk": 0},
        {"dtype": "int8"},
        {"index": "quest"},
        {"key_weights": "output"},
        {"value_weights": "query"},
        {"basis": "shared"},
        {"basis": "calibrated"},
        {"factor_dtype": "mixed"},
        {"factor_dtype": "int4"},
        {"calibration": 7},
        {"calibration": ""},
        {"calibration": "a" * 65},
        {"base_dtype": "int4"},
        {"base_dtype": "int8", "calibration": "c" * 64, "basis": "calibrated"},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        CompressionSpec(**fields)
    assert any(name in refusal.value.message for name in fields)
    assert refusal.value.hint


def test_canonical_fields_make_the_same_spec_after_json() -> None:
    spec = CompressionSpec(rank_k=3, rank_v="full", index="landmark", recent=7)
    assert CompressionSpec.from_canonical(json.loads(json.dumps(spec.canonical()))) == spec


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(InvalidSpec):
        CompressionSpec.from_canonical({**CompressionSpec().canonical(), "colour": "red"})


def test_a_calibration_comes_with_a_ratio_and_whole_bits() -> None:
    spec = CompressionSpec(calibration="c" * 64, basis="calibrated", factor_dtype="mixed", index="derived")
    assert spec.ratio == 8.0
    assert CompressionSpec.from_canonical(json.loads(json.dumps(spec.canonical()))) == spec
    for fields in ({"rank_k": 4, "rank_v": 4}, {"factor_dtype": "bfloat16"}):
        with pytest.raises(InvalidSpec, match="a calibration chooses ranks and bits"):
            CompressionSpec(calibration="c" * 64, **fields)  # type: ignore[arg-type]


def test_bases_of_a_documents_own_have_8_bits_and_shared_ones_none() -> None:
    spec = CompressionSpec(calibration="c" * 64)
    assert spec.over("calibrated").basis == "calibrated" and spec.over("calibrated").base_dtype is None
    own = spec.over("calibrated").over("document")
    assert (own.basis, own.base_dtype) == ("document", "int8")
    assert CompressionSpec.from_canonical(json.loads(json.dumps(own.canonical()))) == own


def test_ids_of_specs_without_a_calibration_are_what_they_were() -> None:
    """Artifacts made before there were calibrations are still found."""
    golden = "3b4324e34d89f1dbf700cb7344c46b2c203dd9d07847669fe1b88a90b25432c3"
    assert artifact_id("0" * 64, "default", range(9), CompressionSpec().canonical()) == golden
    assert set(CompressionSpec().canonical()) == {
        "group_size", "ratio", "rank_k", "rank_v", "key_share", "dtype", "factor_dtype", "index",
        "sketch_planes", "landmark_chunk", "sink", "recent", "outlier_chunks", "key_weights", "value_weights",
    }  # fmt: skip
    assert CompressionSpec(base_dtype="int8").canonical()["base_dtype"] == "int8"
    with_one = CompressionSpec(calibration="c" * 64).canonical()
    assert (with_one["calibration"], with_one["basis"]) == ("c" * 64, "document")
