"""The golden prefixes that a calibration chose groups and bits of: with bases of their own, and without."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from golden_numbers import FINGERPRINT, TOKEN_IDS, ramp, steps
from make_calibration_golden import GROUPS, shared_calibration_manifest

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, Fidelity, GroupLayout, ModelIdentity, PrefixManifest
from xkv_service.packed_factors import Runs, pack

Tensors = dict[str, torch.Tensor]

IDS = TOKEN_IDS[:13]
BLOCK = 64
PACKED_SPEC: dict[str, Any] = {
    "group_size": 4,
    "ratio": 8.0,
    "rank_k": None,
    "rank_v": None,
    "key_share": 0.4,
    "dtype": "bfloat16",
    "factor_dtype": "mixed",
    "index": "derived",
    "sketch_planes": 1,
    "landmark_chunk": 8,
    "sink": 1,
    "recent": 1,
    "outlier_chunks": 0,
    "key_weights": "none",
    "value_weights": "none",
    "calibration": "89abcdef" * 8,
    "basis": "document",
}
PACKED_KEYS: Runs = ((8, 3), (4, 66), (2, 5))
PACKED_VALUES: Runs = ((8, 1), (2, 67))
SHARED_KEYS: tuple[Runs, ...] = (((4, 3),), ((4, 5),))
SHARED_VALUES: tuple[Runs, ...] = (((4, 3),), ((4, 1),))


def packed_tensors() -> Tensors:
    """Two layers of unlike heads, with bases of their own; sketches are to be derived."""
    tensors = {
        "tokens": torch.tensor(IDS, dtype=torch.int32),
        "layer.0.sketch.planes": torch.tensor([[[0, 2]], [[1, 3]]], dtype=torch.int16),
        "layer.1.sketch.planes": torch.tensor([[[2, 5]]], dtype=torch.int16),
    } | _packed_rotary()
    for kind, runs, width in (("key", PACKED_KEYS, 14), ("value", PACKED_VALUES, 7)):
        for block, (rank, columns) in enumerate(_blocks(runs)):
            tensors[f"group.0.{kind}.factors.{block}"] = columns
            tensors[f"group.0.{kind}.bases.{block}"] = ramp(torch.bfloat16, rank, width)
    for layer, heads, dim, value_dim in ((0, 2, 4, 2), (1, 1, 6, 3)):
        tensors[f"layer.{layer}.exact.positions"] = torch.tensor([0, 12], dtype=torch.int32)
        tensors[f"layer.{layer}.exact.keys"] = ramp(torch.bfloat16, 2, heads, dim)
        tensors[f"layer.{layer}.exact.values"] = ramp(torch.bfloat16, 2, heads, value_dim)
    return tensors


def integer_tensors() -> Tensors:
    """The same two layers, their bases as integers with a scale a row."""
    tensors = packed_tensors()
    for kind, runs, width in (("key", PACKED_KEYS, 14), ("value", PACKED_VALUES, 7)):
        for block, (rank, _) in enumerate(_blocks(runs)):
            tensors[f"group.0.{kind}.bases.{block}"] = steps(8, rank, width)
        rows = torch.arange(sum(count for _, count in runs))
        tensors[f"group.0.{kind}.scales"] = 2.0 ** -(rows % 3)
    return tensors


def integer_manifest() -> PrefixManifest:
    return _manifest(PACKED_SPEC | {"base_dtype": "int8"}, packed_manifest().groups)


def _packed_rotary() -> Tensors:
    """Layer 0 is turned by an angle per position, layer 1 by recorded tables, which `scaling` is part of."""
    return {
        "rotary.0.planes": torch.tensor([[0, 2], [1, 3]], dtype=torch.int32),
        "rotary.0.scaling": torch.tensor([1.5], dtype=torch.float64),
        "rotary.0.rounding": torch.tensor([1], dtype=torch.int32),
        "rotary.0.inv_freq": torch.tensor([1.0, 0.125]),
        "rotary.1.planes": torch.tensor([[0, 3], [1, 4]], dtype=torch.int32),
        "rotary.1.scaling": torch.tensor([2.0], dtype=torch.float64),
        "rotary.1.rounding": torch.tensor([0], dtype=torch.int32),
        "rotary.1.cos": (torch.arange(26) % 7 - 3.0).reshape(13, 2) / 4,
        "rotary.1.sin": (torch.arange(26) % 5 - 2.0).reshape(13, 2) / 4,
    }


def packed_manifest() -> PrefixManifest:
    group = GroupLayout(
        layers=(0, 1),
        kv_heads=(2, 1),
        key_widths=(8, 6),
        value_widths=(4, 3),
        rotary=(0, 1),
        rank_k=74,
        rank_v=68,
        columns_k=PACKED_KEYS,
        columns_v=PACKED_VALUES,
    )
    return _manifest(PACKED_SPEC, (group,))


def shared_tensors() -> Tensors:
    """Over the bases of a golden calibration that numbers the groups the other way; an index of landmarks."""
    tensors = {
        "tokens": torch.tensor(IDS, dtype=torch.int32),
        "rotary.0.planes": torch.tensor([[0, 2], [1, 3]], dtype=torch.int32),
        "rotary.0.scaling": torch.tensor([1.0], dtype=torch.float64),
        "rotary.0.rounding": torch.tensor([2], dtype=torch.int32),
        "rotary.0.inv_freq": torch.tensor([0.5, 0.25]),
    }
    for kind, groups in (("key", SHARED_KEYS), ("value", SHARED_VALUES)):
        for number, runs in enumerate(groups):
            for block, (_, columns) in enumerate(_blocks(runs)):
                tensors[f"group.{number}.{kind}.factors.{block}"] = columns
            scales = ramp(torch.float32, sum(count for _, count in runs)).abs() / (2 * number + 2)
            tensors[f"group.{number}.{kind}.scales"] = scales
    for layer in (layer for group in GROUPS for layer in group):
        tensors[f"layer.{layer}.landmarks"] = ramp(torch.float16, 2, 1, 4)
        tensors[f"layer.{layer}.exact.positions"] = torch.tensor([0], dtype=torch.int32)
        tensors[f"layer.{layer}.exact.keys"] = ramp(torch.float16, 1, 1, 4)
        tensors[f"layer.{layer}.exact.values"] = ramp(torch.float16, 1, 1, 4)
    return tensors


def shared_manifest() -> PrefixManifest:
    groups = tuple(
        GroupLayout(
            layers=layers,
            kv_heads=(1, 1),
            key_widths=(4, 4),
            value_widths=(4, 4),
            rotary=(0, 0),
            rank_k=sum(count for _, count in keys),
            rank_v=sum(count for _, count in values),
            columns_k=keys,
            columns_v=values,
        )
        for layers, keys, values in zip(GROUPS, SHARED_KEYS, SHARED_VALUES, strict=True)
    )
    changed = {"dtype": "float16", "factor_dtype": "int4", "index": "landmark", "recent": 0}
    calibration = shared_calibration_manifest().id
    return _manifest(PACKED_SPEC | changed | {"calibration": calibration, "basis": "calibrated"}, groups)


def _blocks(runs: Runs) -> Iterator[tuple[int, torch.Tensor]]:
    """Columns of each block, and the block as it is stored."""
    for bits, count in runs:
        for columns in torch.split(steps(bits, len(IDS), count), BLOCK, dim=1):
            yield columns.shape[1], pack(columns.contiguous(), bits)


def _manifest(spec: dict[str, Any], groups: tuple[GroupLayout, ...]) -> PrefixManifest:
    return PrefixManifest(
        id=artifact_id(FINGERPRINT, "golden.v1", IDS, spec),
        model=ModelIdentity(
            fingerprint=FINGERPRINT, name="acme/tiny", architecture="Llama", dtype="bfloat16"
        ),
        namespace="golden.v1",
        spec=spec,
        tokens=len(IDS),
        bytes_full=10_000,
        groups=groups,
        document=DocumentRef(uri="corpus/größe.txt", sha256="fedcba9876543210" * 4),
        fidelity=Fidelity(
            top1_agreement=0.96875,
            kl=0.015625,
            positions=4,
            key_error=(0.25,) * len(groups),
            value_error=(0.5,) * len(groups),
        ),
        created=datetime(2026, 11, 26, 9, 0, 0, 123456, tzinfo=timezone.utc),
    )
