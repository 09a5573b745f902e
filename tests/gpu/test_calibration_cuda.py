"""Calibrating, and compressing with a calibration, on a GPU as on a CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "service"))
from compressed import random_ids
from families import tiny_model

from xkv_service import SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.factorization.quantize import quantize_runs
from xkv_service.packed_factors import PackedFactors, Runs
from xkv_service.reconstruct import rebuild

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = CalibrationSettings(
    ratio=3.0, ratios=(3.0,), group_size=2, weightings=("tolerance+both",), most_ratio=2.0
)
IDS = random_ids(400)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Made on the GPU, stored and read."""
    model = copy.deepcopy(tiny_model("llama")).cuda()
    sample = [ProbedPrefix.of_text(f"text {i}", random_ids(400, seed=i).tolist()) for i in range(4)]
    made = calibrate(model, sample, SETTINGS)
    groups = tuple(group.layers for group in made.groups)
    return Calibration.from_tensors(groups, made.to_tensors(), made.figures, "c" * 64)


def test_runs_are_rounded_and_unpacked_as_on_a_cpu() -> None:
    runs: Runs = ((8, 70), (4, 33), (2, 5))
    factors = torch.randn(5000, 108, generator=torch.Generator().manual_seed(0)) * torch.logspace(2, -2, 108)
    expected, expected_scales = quantize_runs(factors, runs, slice(4, 5000))
    found, scales = quantize_runs(factors.cuda(), runs, slice(4, 5000))
    torch.testing.assert_close(scales.cpu(), expected_scales)
    assert float((found[:].cpu() != expected[:]).double().mean()) < 1e-3
    rows = torch.tensor([7, 3, 4999])
    again = PackedFactors(runs, tuple(piece.cpu() for piece in found.pieces))
    assert torch.equal(found[rows.cuda()].cpu(), again[rows])


@pytest.mark.parametrize("basis", ["calibrated", "document"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_compressed_on_a_gpu_is_the_cpus(
    calibration: Calibration, basis: str, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", dtype=dtype)
    spec = calibrated_spec(2.0, calibration, basis=basis)
    expected = compress(model, IDS, spec, calibration)
    found = compress(copy.deepcopy(model).cuda(), IDS, spec, calibration)
    assert [one.layout for one in found.groups] == [one.layout for one in expected.groups]
    for layer in expected.layers:
        for mine, other in zip(rebuild(found, layer), rebuild(expected, layer), strict=True):
            assert float((mine.cpu().float() - other).norm() / other.norm()) < 0.1


def test_decoding_on_a_gpu_gives_the_cpus_logits(calibration: Calibration) -> None:
    model, spec = tiny_model("llama"), SelectionSpec("sketch", 40, recent=0)
    factors = compress(model, IDS, calibrated_spec(2.0, calibration), calibration)
    logits = []
    for one in (model, copy.deepcopy(model).cuda()):
        with torch.no_grad(), enable_xkv(one):
            cache = XKVCache.from_factors(one, factors, spec)
            ids = random_ids(5, seed=3)[None].to(one.device)
            logits.append(one(ids, past_key_values=cache).logits.cpu())
    difference = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert float(difference) < 0.05
