"""The accelerator's paths of compression, held against the plain ones. Run with `pytest -m gpu` on a GPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "service"))
from families import tiny_model

from xkv_service.compression import compress, factorize_prefill
from xkv_service.factorization.gram import accumulate_gram
from xkv_service.factorization.subspace import leading_eigenvectors
from xkv_service.fidelity import held_back
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import dense_cache, rebuild
from xkv_service.spec import CompressionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = CompressionSpec(group_size=2, rank_k=24, rank_v=40, outlier_chunks=2)
IDS = torch.randint(3, 96, (700,), generator=torch.Generator().manual_seed(0))


def test_a_bf16_gram_matrix_is_the_float64_one() -> None:
    layers = [torch.randn(9000, 2, 64, device="cuda").bfloat16() * scale for scale in (1, 1000)]
    gram = accumulate_gram(
        lambda index, start, stop: layers[index][start:stop],
        [128, 128],
        (4, 9000),
        chunk_tokens=2048,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    x = torch.cat([layer.flatten(1) for layer in layers], 1)[4:].double()
    scale = x.norm(dim=0)[:, None] * x.norm(dim=0)
    assert ((gram.double() - x.T @ x).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("outliers", [0, 8])
def test_batched_subspace_iteration_is_within_half_a_percent(outliers: int) -> None:
    x = torch.randn(8192, 1024, device="cuda") * torch.arange(1, 1025, device="cuda") ** -0.5
    x = x @ torch.linalg.qr(torch.randn(1024, 1024, device="cuda"))[0]
    x[:, :outliers] *= 1000
    exact = x.bfloat16().double()
    gram = (exact.T @ exact).float()
    vectors, _ = leading_eigenvectors(gram.expand(4, -1, -1), 128)
    optimal = torch.linalg.svdvals(exact)[128:].square().sum().sqrt()
    for basis in vectors:
        assert (exact - exact @ basis @ basis.T).norm() <= 1.005 * optimal


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_factors_rebuild_as_well_as_those_made_on_a_cpu(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    on_gpu = copy.deepcopy(model).cuda()
    exact = {name: prefill(one, IDS) for name, one in (("cpu", model), ("cuda", on_gpu))}
    made = {
        name: factorize_prefill(one, exact[name], SPEC) for name, one in (("cpu", model), ("cuda", on_gpu))
    }
    for kind in ("key_error", "value_error"):
        cpu, cuda = (getattr(made[name][1], kind) for name in ("cpu", "cuda"))
        assert cuda == pytest.approx(cpu, rel=0.02, abs=1e-4)
    layer = made["cuda"][0].layers[0]
    keys, values = rebuild(made["cuda"][0], layer)
    assert (keys.float() - exact["cuda"].keys(layer)).norm() < 0.6 * exact["cuda"].keys(layer).norm()
    assert (values.float() - exact["cuda"].values(layer)).norm() < 0.6 * exact["cuda"].values(layer).norm()


def test_a_full_rank_compression_answers_like_the_exact_cache() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).cuda()
    factors = compress(model, IDS, CompressionSpec(group_size=2, rank_k="full", rank_v="full"))
    assert factors.fidelity is not None
    assert factors.fidelity.positions == held_back(700)
    assert factors.fidelity.kl < 0.01
    cache = dense_cache(model, factors, 650)
    with torch.inference_mode():
        rebuilt = model(input_ids=IDS[None, 650:].cuda(), past_key_values=cache).logits
        exact = model(input_ids=IDS[None].cuda()).logits[:, 650:]
    assert (rebuilt - exact).float().norm() < 0.05 * exact.float().norm()
