"""What one half of a sample keeps of the other."""

from __future__ import annotations

import pytest
import torch

from xkv_service.calibration.calibration import KINDS, CalibratedGroup, Calibration, SharedBasis
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.stability import stability
from xkv_service.modeling.layout import LayerLayout

DIM = 8


def layer(index: int) -> LayerLayout:
    return LayerLayout(index=index, kind="full", kv_heads=1, head_dim=DIM, value_dim=DIM, query_heads=1)


def moments(directions: torch.Tensor) -> Moments:
    """Of 64 tokens that lie along the rows of `directions` [n, 2 * DIM], with a little of everything."""
    found = Moments.empty([layer(0), layer(1)], 1, torch.device("cpu"))
    rows = torch.cat([directions.double().repeat(64 // len(directions), 1), 0.01 * torch.eye(16).double()])
    for kind in KINDS:
        found._add(found.kind(kind), [rows[:, :DIM], rows[:, DIM:]])
    found.tokens = len(rows)
    return found


def made_of(found: Moments) -> Calibration:
    """One group; its energies are right, and nobody asks for its bases."""
    unit = torch.eye(DIM)[None]
    energies = torch.linalg.eigvalsh(found.gram("key", 0, 2)).flip(0).clamp_min(0).float()
    basis = SharedBasis(torch.eye(16), (unit, unit), energies)
    return Calibration((CalibratedGroup((0, 1), basis, basis),), {}, id="candidate")


def test_halves_that_agree_keep_all() -> None:
    half = moments(torch.eye(16)[:4])
    assert stability([half, half], made_of(half), 8.0) == pytest.approx(1)


def test_halves_that_differ_keep_little() -> None:
    one, other = moments(torch.eye(16)[:4]), moments(torch.eye(16)[4:8])
    kept = stability([one, other], made_of(one), 32.0)
    assert kept is not None and kept < 0.1


def test_one_half_says_nothing() -> None:
    half = moments(torch.eye(16)[:4])
    assert stability([half], made_of(half), 8.0) is None
