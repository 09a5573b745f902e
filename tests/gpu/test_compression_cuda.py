"""The accelerator's paths of compression, held against the plain ones. Run with `pytest -m gpu` on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_model

from xkv_service.compression import compress, factorize_prefill
from xkv_service.factorization.gram import accumulate_gram
from xkv_service.factorization.quantize import (
    best_scales,
    quantize_columns,
    quantize_runs,
    round_odd_plainly,
    round_plainly,
    squared_errors_plainly,
)
from xkv_service.factorization.subspace import leading_eigenvectors
from xkv_service.fidelity import held_back
from xkv_service.kernels.probe import has_kernels
from xkv_service.kernels.split_product import split, split_product
from xkv_service.kernels.wide_copy import copy_states
from xkv_service.modeling.rotary import rotate_planes
from xkv_service.packed_factors import pack, unpack
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import dense_cache, rebuild
from xkv_service.selection.sketch import choose_planes, encode, encode_plainly
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


def test_this_device_has_the_kernels() -> None:
    """Else the tests below hold PyTorch against itself."""
    assert has_kernels(torch.zeros(1, device="cuda").device)


def cached(
    heads: int = 8, tokens: int = 1000, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """States [tokens - 4, heads, dim], a view as a cache gives it."""
    return torch.randn(heads, tokens, dim, device="cuda").to(dtype)[:, 4:].transpose(0, 1)


def test_a_split_product_is_the_product() -> None:
    grams = torch.randn(3, 300, 300, device="cuda") * torch.logspace(-3, 3, 300, device="cuda")
    basis = torch.randn(3, 300, 70, device="cuda").bfloat16()
    exact = grams.double() @ basis.double()
    assert (split_product(split(grams), basis).double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [5, 8])
def test_the_kernel_encodes_sketches_as_pytorch_does(dtype: torch.dtype, count: int) -> None:
    keys = cached(dtype=dtype)
    keys[7] = 0
    pairs = torch.stack([torch.arange(64), torch.arange(64) + 64], 1)
    planes = choose_planes(
        torch.rand(8, 128, device="cuda"), torch.rand(32, 128, device="cuda"), pairs, count
    )
    (codes, scales), (plain, expected) = encode(keys, planes), encode_plainly(keys, planes)
    torch.testing.assert_close(scales, expected, rtol=1e-3, atol=0)  # PyTorch divides by a number as it likes
    assert (scales != expected).float().mean() < 1e-3
    for found, other in ((codes & 15, plain & 15), (codes >> 4, plain >> 4)):
        apart = (found.int() - other.int()).abs()  # quotients half way between two levels may round apart
        assert apart.max() <= 1
        assert apart.float().mean() < 1e-4


def test_the_kernel_rounds_factors_as_pytorch_does() -> None:
    factors = torch.randn(5003, 613, device="cuda") * torch.logspace(-3, 3, 613, device="cuda")
    factors[:4] *= 100
    integers, scales = quantize_columns(factors, slice(4, 5003))
    assert torch.equal(integers, round_plainly(factors, scales))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("before", "count"), [(0, 512), (13, 597)])
def test_the_kernel_rounds_to_few_bits_as_pytorch_does(bits: int, before: int, count: int) -> None:
    """A multiple that PyTorch does not choose has an error within 1e-5 of the one it does."""
    wide = torch.randn(5003, 640, device="cuda") * torch.logspace(-3, 3, 640, device="cuda")
    factors = wide[:, before : before + count]
    factors[:4] *= 100
    factors[70] *= 30
    packed, scales = quantize_runs(factors, ((bits, count),), slice(4, 5000))
    integers, plain = unpack(packed.pieces[0], bits, count), round_odd_plainly(factors, scales, bits)
    apart = (integers != plain).nonzero().unbind(1)
    assert not len(apart[0]), (apart, integers[apart], plain[apart], factors[apart], scales[apart[1]])
    assert torch.equal(packed.pieces[0], pack(plain, bits))
    counted = factors[4:5000].cpu()
    best = best_scales(counted, bits)  # on the CPU
    errors = squared_errors_plainly(counted.double(), torch.stack([scales.cpu(), best]).double(), bits)
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert (scales.cpu() / best - 1).abs().lt(1e-5).float().mean() > 0.99
    again, same = quantize_runs(factors, ((bits, count),), slice(4, 5000))
    assert torch.equal(again.pieces[0], packed.pieces[0]) and torch.equal(same, scales)


@pytest.mark.parametrize("dim", [128, 6])
def test_states_are_copied_whole(dim: int) -> None:
    states = cached(dim=dim)
    rows = torch.zeros(996, 2 * 8 * dim, device="cuda", dtype=torch.bfloat16)
    copy_states(rows[:, 8 * dim :].view(states.shape), states)
    assert torch.equal(rows[:, 8 * dim :], states.reshape(996, -1))
    assert not rows[:, : 8 * dim].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_rotates_into_place_as_pytorch_does(dtype: torch.dtype) -> None:
    keys, angles = cached(), torch.randn(996, 64, device="cuda")
    planes = torch.stack([torch.arange(64), torch.arange(64) + 64], 1)
    out = torch.zeros(8, 996, 128, device="cuda", dtype=dtype).transpose(0, 1)
    rotate_planes(keys, planes, angles.cos(), angles.sin(), out)
    expected = rotate_planes(keys.cpu(), planes, angles.cos().cpu(), angles.sin().cpu())
    torch.testing.assert_close(out.cpu(), expected.to(dtype), atol=1e-5, rtol=1e-2)


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
    model = tiny_model(family, dtype=torch.bfloat16, max_position_embeddings=1024)
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
    model = tiny_model("llama", dtype=torch.bfloat16, max_position_embeddings=1024).cuda()
    factors = compress(model, IDS, CompressionSpec(group_size=2, rank_k="full", rank_v="full"))
    assert factors.fidelity is not None
    assert factors.fidelity.positions == held_back(700)
    assert factors.fidelity.kl < 0.01
    cache = dense_cache(model, factors, 650)
    with torch.inference_mode():
        rebuilt = model(input_ids=IDS[None, 650:].cuda(), past_key_values=cache).logits
        exact = model(input_ids=IDS[None].cuda()).logits[:, 650:]
    assert (rebuilt - exact).float().norm() < 0.05 * exact.float().norm()
