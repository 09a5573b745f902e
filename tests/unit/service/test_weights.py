"""Feature weights: what they minimise, and that they leave decoding alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xkv_service.factorization.factorize import factorize
from xkv_service.factorization.weights import (
    FeatureWeights,
    output_projection,
    output_weights,
    plane_energy,
    query_weights,
)
from xkv_service.modeling.rotary import rotate_planes

HEADS, QUERY_HEADS, DIM = 2, 6, 8
PLANES = torch.tensor([[0, 4], [1, 5], [2, 6]])


def dense(weights: FeatureWeights) -> torch.Tensor:
    return torch.block_diag(*weights.blocks)


def random_query_weights(seed: int) -> FeatureWeights:
    energy = torch.rand(QUERY_HEADS, DIM, generator=torch.Generator().manual_seed(seed)) ** 4
    return query_weights(energy, PLANES, HEADS)


def random_output_weights(seed: int) -> FeatureWeights:
    generator = torch.Generator().manual_seed(seed)
    return output_weights(torch.randn(20, QUERY_HEADS * DIM, generator=generator), QUERY_HEADS, HEADS)


BOTH = pytest.mark.parametrize("make", [random_query_weights, random_output_weights])


@BOTH
def test_full_rank_is_exact(make: type) -> None:
    x = torch.randn(100, 2 * HEADS * DIM, dtype=torch.float64)
    (result,) = factorize((x.T @ x)[None], [x.shape[1]], [[make(0), make(1)]])
    torch.testing.assert_close(x @ result.projection @ result.bases, x, atol=1e-9, rtol=0)


@BOTH
def test_the_weighted_error_is_the_least_and_the_reported_error_the_plain_one(make: type) -> None:
    x = torch.randn(200, 2 * HEADS * DIM, dtype=torch.float64)
    gram = (x.T @ x)[None]
    weights = [make(0), make(1)]
    weight = torch.block_diag(*map(dense, weights))
    (weighted,), (plain,) = factorize(gram, [9], [weights]), factorize(gram, [9])
    residuals = [x - x @ result.projection @ result.bases for result in (weighted, plain)]
    assert (residuals[0] @ weight).norm() < (residuals[1] @ weight).norm()
    assert residuals[0].norm() > residuals[1].norm()
    best = torch.linalg.svdvals(x @ weight)[9:].square().sum().sqrt()
    assert float((residuals[0] @ weight).norm()) == pytest.approx(float(best), rel=1e-6)
    assert weighted.error == pytest.approx(float(residuals[0].norm() / x.norm()), rel=1e-6)


def test_query_weights_commute_with_rotation() -> None:
    keys = torch.randn(10, HEADS, DIM)
    angles = torch.randn(10, len(PLANES))
    weight = random_query_weights(3).blocks.float()
    scaled = torch.einsum("thd,hde->the", keys, weight)
    before = rotate_planes(scaled, PLANES, angles.cos(), angles.sin())
    after = torch.einsum("thd,hde->the", rotate_planes(keys, PLANES, angles.cos(), angles.sin()), weight)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_query_weights_are_the_root_mean_square_of_the_heads_queries() -> None:
    energy = torch.zeros(QUERY_HEADS, DIM)
    energy[3:, 7] = 4.0
    energy[4, 0] = 6.0
    root = query_weights(energy, PLANES, HEADS).blocks.diagonal(dim1=1, dim2=2)
    assert root[1, 7] == pytest.approx(2.0, rel=0.01)
    assert root[1, 0] == root[1, 4] == pytest.approx(1.0, rel=0.05)
    assert 0 < root[0].max() < 0.1


def test_output_weights_give_the_energy_that_reaches_the_residual_stream() -> None:
    projection = torch.randn(20, QUERY_HEADS * DIM)
    weights = output_weights(projection, QUERY_HEADS, HEADS)
    error = torch.randn(DIM, dtype=torch.float64)
    per_query_head = projection.double().reshape(20, QUERY_HEADS, DIM)[:, 3:]
    through = sum(float((per_query_head[:, head] @ error).square().sum()) for head in range(3))
    assert float((error @ weights.blocks[1]).square().sum()) == pytest.approx(through, rel=0.01)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_degenerate_statistics_still_give_invertible_weights(scale: float) -> None:
    for weights in (
        query_weights(torch.full((QUERY_HEADS, DIM), scale), PLANES, HEADS),
        output_weights(torch.full((20, QUERY_HEADS * DIM), scale), QUERY_HEADS, HEADS),
    ):
        eye = torch.eye(DIM, dtype=torch.float64).expand(HEADS, DIM, DIM)
        torch.testing.assert_close(weights.blocks @ weights.inverses, eye, atol=1e-6, rtol=0)


def test_plane_energy_leaves_unrotated_dimensions_alone() -> None:
    energy = torch.arange(2.0 * DIM).reshape(2, DIM)
    result = plane_energy(energy, PLANES, 2)
    assert result[0].tolist() == [2, 3, 4, 3, 2, 3, 4, 7]


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "dense"])
def test_the_output_projection_is_found_by_name_and_shape(name: str) -> None:
    module = nn.Module()
    setattr(module, name, nn.Linear(48, 20))
    found = output_projection(module, 48)
    assert found is not None
    assert found.shape == (20, 48)
    assert output_projection(module, 40) is None
    assert output_projection(nn.Module(), 48) is None
