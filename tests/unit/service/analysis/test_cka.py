"""Linear CKA: equal, rotated and unrelated layers, and the plain formula."""

from __future__ import annotations

import torch

from xkv_service.analysis.chunks import ReadChunk
from xkv_service.analysis.cka import linear_cka


def _read(layers: list[torch.Tensor]) -> ReadChunk:
    return lambda layer, start, stop: layers[layer][start:stop]


def _cka(layers: list[torch.Tensor], **options: int) -> torch.Tensor:
    widths = [layer[0].numel() for layer in layers]
    return linear_cka(_read(layers), range(len(layers)), widths, len(layers[0]), **options)


def _plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The definition, on the kernels of centred tokens: the slow way around."""
    x, y = (one.flatten(1).double() - one.flatten(1).double().mean(0) for one in (x, y))
    k, m = x @ x.T, y @ y.T
    return (k * m).sum() / (k.norm() * m.norm())


def test_equal_rotated_scaled_and_shifted_layers_are_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 12) @ torch.randn(12, 12) + 3
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    torch.testing.assert_close(_cka([x, x, 5 * x @ rotation, x - 7]), torch.ones(4, 4, dtype=torch.float64))


def test_it_is_the_definition_however_it_is_cut() -> None:
    torch.manual_seed(1)
    shared = torch.randn(90, 6)
    layers = [shared @ torch.randn(6, width) + torch.randn(90, width) + 2 for width in (8, 12, 8, 4)]
    layers = [layer.view(90, -1, 4) for layer in layers]  # heads of four features
    wanted = torch.tensor([[_plain(a, b) for b in layers] for a in layers], dtype=torch.float64)
    assert 0.05 < wanted[0, 1] < 0.95
    for panel_bytes in (1, 8 * 8 * 40, 2**20):
        torch.testing.assert_close(_cka(layers, panel_bytes=panel_bytes), wanted)


def test_independent_features_are_not_alike() -> None:
    torch.manual_seed(2)
    alike = _cka([torch.randn(20_000, 4), torch.randn(20_000, 4)])
    assert alike[0, 1] < 0.01


def test_a_layer_that_never_changes_is_like_none() -> None:
    alike = _cka([torch.ones(30, 4), torch.randn(30, 4)])
    assert torch.equal(alike, torch.eye(2, dtype=torch.float64))
