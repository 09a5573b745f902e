"""Calibrating, and compressing with a calibration, on a GPU as on a CPU. Run with `pytest -m gpu`.

Tolerances are several times what stand-ins for a GPU gave on a CPU (eager attention instead of sdpa, products
of numbers of 16 bits where the model has such): errors of rebuilt keys and values up to 1e-5 with 32 bits and
0.041 with 16, of logits up to 6e-6.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_service import SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.compression import compress_each
from xkv_service.errors import UnsupportedModel
from xkv_service.factorization.quantize import quantize_runs
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.packed_factors import PackedFactors, Runs
from xkv_service.reconstruct import rebuild

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = CalibrationSettings(
    ratio=3.0, ratios=(3.0,), group_size=2, weightings=("tolerance+both",), most_ratio=2.0
)
# The noise that tolerances are measured with is another on every kind of device; this metric has none.
PLAIN = replace(SETTINGS, weightings=("plain",), selection=SelectionSpec("dense"))
IDS = random_ids(400)
SAMPLE = [ProbedPrefix.of_text(f"text {i}", random_ids(400, seed=i).tolist()) for i in range(4)]


def calibrated(model: PreTrainedModel, settings: CalibrationSettings) -> Calibration:
    """A calibration, stored and read."""
    made = calibrate(model, SAMPLE, settings)
    groups = tuple(group.layers for group in made.groups)
    return Calibration.from_tensors(groups, made.to_tensors(), made.figures, "c" * 64)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Made on the GPU."""
    return calibrated(copy.deepcopy(tiny_model("llama")).cuda(), SETTINGS)


def family_model(family: str, device: str) -> PreTrainedModel:
    """Latents without experts, whose kernels are no part of this; not every Transformers caches latents."""
    changes = {"first_k_dense_replace": 3} if family == "deepseek_v3" else {}
    model = tiny_model(family, **changes).to(device)
    try:
        inspect_loaded(model)
    except UnsupportedModel as error:
        pytest.skip(error.message)
    return model


def logits_after(model: PreTrainedModel, factors: PrefixFactors, spec: SelectionSpec) -> torch.Tensor:
    """Decoded from the factors, on the CPU."""
    ids = random_ids(5, seed=3)[None].to(model.device)
    with torch.no_grad(), enable_xkv(model):
        cache = XKVCache.from_factors(model, factors, spec)
        logits: torch.Tensor = model(ids, past_key_values=cache).logits
    return logits.cpu().float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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


def test_documents_share_a_calibrations_bases_on_the_gpu(calibration: Calibration) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).cuda()
    spec = calibrated_spec(2.0, calibration, basis="calibrated")
    one, other = (compress(model, IDS[first:], spec, calibration) for first in (0, 1))
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert mine.keys.directions.is_cuda
        assert mine.keys.directions.data_ptr() == theirs.keys.directions.data_ptr()


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
    tolerance = 0.01 if dtype == torch.float32 else 0.1
    for layer in expected.layers:
        for mine, other in zip(rebuild(found, layer), rebuild(expected, layer), strict=True):
            assert relative(mine.cpu().float(), other.float()) < tolerance


def test_decoding_on_a_gpu_gives_the_cpus_logits(calibration: Calibration) -> None:
    model, spec = tiny_model("llama"), SelectionSpec("sketch", 40, recent=0)
    factors = compress(model, IDS, calibrated_spec(2.0, calibration), calibration)
    expected = logits_after(model, factors, spec)
    assert relative(logits_after(copy.deepcopy(model).cuda(), factors, spec), expected) < 0.05


@pytest.mark.parametrize(("family", "ratio"), [("llama", 2.0), ("deepseek_v3", 1.6)])
def test_calibrating_compressing_and_decoding_on_a_gpu_give_the_cpus_logits(
    family: str, ratio: float
) -> None:
    """Moments, bases, bits, factors over shared bases, decoding: nothing is handed from one to the other."""
    settings = replace(PLAIN, ratio=ratio, ratios=(ratio,), most_ratio=1.5)
    made, logits = [], []
    for device in ("cpu", "cuda"):
        model = family_model(family, device)
        made.append(calibrated(model, settings))
        factors = compress(model, IDS, calibrated_spec(ratio, made[-1]), made[-1])
        logits.append(logits_after(model, factors, SelectionSpec("dense")))
    assert [group.layers for group in made[0].groups] == [group.layers for group in made[1].groups]
    for cpu, cuda in zip(*(one.groups for one in made), strict=True):
        assert cpu.keys.bases.shape == cuda.keys.bases.shape
        most = float(cpu.keys.energies[0])
        torch.testing.assert_close(cuda.keys.energies, cpu.keys.energies, rtol=1e-3, atol=1e-5 * most)
    assert relative(logits[1], logits[0]) < 0.02


def test_latents_select_on_a_gpu_as_on_a_cpu() -> None:
    """Packed leading columns, unpacked and scored there."""
    model = family_model("deepseek_v3", "cpu")
    made = calibrated(model, replace(PLAIN, ratio=1.6, ratios=(1.6,), most_ratio=1.5))
    factors = compress(model, IDS, calibrated_spec(1.6, made), made)
    spec = SelectionSpec("auto", 40, recent=0)
    expected = logits_after(model, factors, spec)
    assert relative(logits_after(copy.deepcopy(model).cuda(), factors, spec), expected) < 0.05


def test_one_prefill_on_a_gpu_serves_several_ways_to_compress(calibration: Calibration) -> None:
    model = copy.deepcopy(tiny_model("llama")).cuda()
    specs = [calibrated_spec(2.0, calibration, basis=basis) for basis in ("document", "calibrated")]
    for one, spec in zip(compress_each(model, IDS, specs, calibration), specs, strict=True):
        alone = compress(model, IDS, spec, calibration)
        assert one.fidelity is not None and alone.fidelity is not None
        assert one.fidelity.kl == pytest.approx(alone.fidelity.kl, rel=0.05, abs=1e-6)
