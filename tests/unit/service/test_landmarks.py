"""Chunk landmarks and outlier chunks."""

from __future__ import annotations

import torch

from xkv_service.modeling.rotary import rotate_planes
from xkv_service.selection.exact import exact_count, exact_positions, outlier_range
from xkv_service.selection.landmarks import chunk_likeness, landmarks, outlier_chunks
from xkv_service.spec import CompressionSpec


def test_landmarks_are_means_of_whole_and_last_chunks() -> None:
    keys = torch.randn(21, 2, 6)
    means = landmarks(keys, 8)
    assert means.shape == (3, 2, 6)
    torch.testing.assert_close(means[1], keys[8:16].mean(0))
    torch.testing.assert_close(means[2], keys[16:].mean(0))


def test_landmarks_of_spans_join_to_those_of_the_whole() -> None:
    keys = torch.randn(50, 2, 6).bfloat16()
    joined = torch.cat([landmarks(keys[:16], 8), landmarks(keys[16:], 8)])
    assert torch.equal(joined, landmarks(keys, 8))


def test_landmarks_shift_exactly() -> None:
    keys, planes = torch.randn(40, 2, 6), torch.tensor([[0, 3], [1, 4], [2, 5]])
    cos, sin = torch.rand(1, 3).cos(), torch.rand(1, 3).sin()
    shifted = landmarks(rotate_planes(keys, planes, cos, sin), 8)
    torch.testing.assert_close(
        rotate_planes(landmarks(keys, 8), planes, cos, sin), shifted, atol=1e-6, rtol=1e-5
    )


def test_the_chunk_with_an_odd_key_in_one_head_is_the_outlier() -> None:
    keys = torch.ones(80, 2, 6) + 0.01 * torch.randn(80, 2, 6)
    keys[43, 1] = -5.0
    likeness = chunk_likeness(keys, 8)
    assert likeness.shape == (10,)
    assert outlier_chunks(likeness, 1, 0, 10) == [5]
    assert outlier_chunks(likeness, 3, 6, 8) == [6, 7]


def test_exact_positions_are_sink_outliers_and_recent_without_repeats() -> None:
    spec = CompressionSpec(sink=5, recent=9, outlier_chunks=2, landmark_chunk=4)
    assert outlier_range(40, spec) == (2, 7)
    positions = exact_positions(40, spec, [6, 3])
    assert positions == [0, 1, 2, 3, 4, 12, 13, 14, 15, 24, 25, 26, 27, *range(31, 40)]
    assert len(positions) == exact_count(40, spec)


def test_a_prefix_shorter_than_sink_and_recent_is_all_exact() -> None:
    spec = CompressionSpec(sink=5, recent=9, outlier_chunks=2, landmark_chunk=4)
    for tokens in (1, 4, 10, 13):
        assert exact_positions(tokens, spec, []) == list(range(tokens))
        assert exact_count(tokens, spec) == tokens
