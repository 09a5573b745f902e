"""Key sketches: recall, codes, and the shift to another offset."""

from __future__ import annotations

import pytest
import torch

from xkv_service.modeling.rotary import inverse, rotate_planes
from xkv_service.selection.sketch import KeySketch, candidate_planes, choose_planes, decode, encode, scores

HEADS, QUERY_HEADS, DIM, TOKENS = 2, 4, 32, 400
PLANES = torch.stack([torch.arange(16), torch.arange(16) + 16], 1)


def make_sketch(keys: torch.Tensor, planes: torch.Tensor) -> KeySketch:
    return KeySketch(planes, *encode(keys, planes))


def all_planes() -> torch.Tensor:
    return PLANES.to(torch.int16).expand(HEADS, -1, -1)


def test_decoded_values_are_within_half_a_step() -> None:
    keys = torch.randn(TOKENS, HEADS, DIM) * torch.logspace(-3, 3, TOKENS)[:, None, None]
    sketch = make_sketch(keys, all_planes())
    picked = keys[..., PLANES]
    step = picked.abs().amax((-1, -2)) / 7
    assert ((decode(sketch) - picked).abs().amax((-1, -2)) <= 0.51 * step).all()


def test_sizes_and_dtypes_are_those_of_the_format() -> None:
    planes = choose_planes(torch.rand(HEADS, DIM), torch.rand(QUERY_HEADS, DIM), PLANES, 5)
    sketch = make_sketch(torch.randn(TOKENS, HEADS, DIM).bfloat16(), planes)
    assert (sketch.planes.shape, sketch.planes.dtype) == ((HEADS, 5, 2), torch.int16)
    assert (sketch.codes.shape, sketch.codes.dtype) == ((TOKENS, HEADS, 5), torch.uint8)
    assert (sketch.scales.shape, sketch.scales.dtype) == ((TOKENS, HEADS), torch.float16)


def test_zero_and_huge_keys_stay_finite() -> None:
    keys = torch.zeros(3, HEADS, DIM)
    keys[1] = 1e30
    assert torch.isfinite(decode(make_sketch(keys, all_planes()))).all()
    assert (decode(make_sketch(keys, all_planes()))[0] == 0).all()


def test_planes_of_most_energy_are_chosen_per_head() -> None:
    keys, queries = torch.full((HEADS, DIM), 0.1), torch.ones(QUERY_HEADS, DIM)
    keys[0, 19] = 5.0
    keys[1, 2] = 5.0
    queries[3, 7] = 1000.0
    planes = choose_planes(keys, queries, PLANES, 2)
    assert planes[0, 0].tolist() == [3, 19]
    assert planes[1, 0].tolist() == [7, 23]
    assert planes[1, 1].tolist() == [2, 18]


def test_candidates_are_rotary_planes_and_pairs_of_the_rest() -> None:
    planes = torch.tensor([[0, 2], [1, 3]])
    assert candidate_planes(planes, 9).tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert candidate_planes(torch.empty(0, 2, dtype=torch.int64), 4).tolist() == [[0, 1], [2, 3]]


def test_scores_equal_exact_scores_of_the_decoded_keys() -> None:
    keys, queries = torch.randn(TOKENS, HEADS, DIM), torch.randn(3, QUERY_HEADS, DIM)
    planes = choose_planes(torch.rand(HEADS, DIM), torch.rand(QUERY_HEADS, DIM), PLANES, 6)
    sketch = make_sketch(keys, planes)
    rebuilt = torch.zeros_like(keys)
    for head in range(HEADS):
        rebuilt[:, head, sketch.planes[head].long()] = decode(sketch)[:, head]
    expected = torch.einsum("nqd,tqd->nqt", queries, rebuilt.repeat_interleave(2, dim=1))
    torch.testing.assert_close(scores(queries, sketch), expected, atol=1e-4, rtol=1e-4)


def test_half_of_the_planes_recall_the_exact_best_tokens() -> None:
    """Keys with uneven energy over planes, as real keys have: half of the dimensions find the top 16."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -1.5, 16).repeat(2)
    keys = torch.randn(TOKENS, HEADS, DIM, generator=generator) * size
    queries = torch.randn(50, QUERY_HEADS, DIM, generator=generator) * size
    planes = choose_planes(keys.square().mean(0), queries.square().mean(0), PLANES, 8)
    approximate = scores(queries, make_sketch(keys, planes))
    exact = torch.einsum("nqd,tqd->nqt", queries, keys.repeat_interleave(2, dim=1))
    best = exact.topk(16).indices
    kept = torch.zeros_like(exact).scatter(-1, approximate.topk(32).indices, 1.0)
    assert float(kept.gather(-1, best).mean()) > 0.97


@pytest.mark.parametrize("offset", [1, 1000])
def test_a_sketch_shifts_exactly(offset: int) -> None:
    """Turning the decoded planes by an offset gives the scores of the query turned back by it."""
    angles = offset * 10000.0 ** (-torch.arange(16) / 16)
    cos, sin = angles.cos()[None], angles.sin()[None]
    keys, queries = torch.randn(TOKENS, HEADS, DIM), torch.randn(1, QUERY_HEADS, DIM)
    sketch = make_sketch(keys, all_planes())
    x, y = decode(sketch).unbind(-1)
    turned = torch.stack([x * cos - y * sin, y * cos + x * sin], -1)
    picked = queries.reshape(HEADS, 2, DIM)[..., PLANES]
    shifted = torch.einsum("hgpc,thpc->hgt", picked, turned).reshape(1, QUERY_HEADS, TOKENS)
    back = rotate_planes(queries, PLANES, *inverse(cos, sin))
    torch.testing.assert_close(scores(back, sketch), shifted, atol=1e-3, rtol=1e-4)
