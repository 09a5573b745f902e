"""The selection index of a layer whose artifact stores none: a sketch of the keys as the factors give them.

A sketch keeps a few rotary planes of a key, so only their columns of the layer bases are multiplied, and only
they are turned. `derived_plainly` is the reference: it rebuilds whole keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from xkv_service.modeling.rotary import RotaryTable
from xkv_service.packed_factors import PackedFactors
from xkv_service.selection.sketch import KeySketch, encode

_PIECE = 16384
"""Tokens whose keys are rebuilt at once."""


def derived_plainly(
    keys: Callable[[torch.Tensor], torch.Tensor], planes: torch.Tensor, tokens: int
) -> KeySketch:
    """A sketch of whole keys.

    Args:
        keys: rebuilt and rotated keys [k, kv_heads, D] of positions int64 [k].
        planes: int16 [kv_heads, P, 2], the pairs of dimensions to keep, on the device of the factors.
    """
    positions = torch.arange(tokens, device=planes.device)
    return _joined(planes, [encode(keys(piece), planes) for piece in torch.split(positions, _PIECE)])


class KeptPlanes:
    """How the planes of a sketch turn.

    Args:
        planes: int16 [kv_heads, P, 2], each a plane of the table or two dimensions that do not turn.
        table: how keys turn.

    Raises:
        KeyError: a pair that is neither.
    """

    def __init__(self, planes: torch.Tensor, table: RotaryTable) -> None:
        self.planes = planes
        numbers = {tuple(pair): number for number, pair in enumerate(table.planes.tolist())}
        turning, still = set(table.planes.flatten().tolist()), table.planes.shape[0]
        pairs = [tuple(pair) for head in planes.tolist() for pair in head]
        numbers |= {pair: still for pair in pairs if turning.isdisjoint(pair)}
        self._numbers = torch.tensor([numbers[pair] for pair in pairs], device=planes.device)

    def sketch(
        self, factors: torch.Tensor | PackedFactors, bases: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> KeySketch:
        """The sketch of the turned keys A B.

        Args:
            factors: A [T, r]. bases: B [r, kv_heads D], in the dtype of the product.
            cos, sin: of positions 0 .. T - 1, [T, planes of the table].
        """
        heads, count, _ = self.planes.shape
        by_head = bases.reshape(len(bases), heads, -1)
        head = torch.arange(heads, device=bases.device)[:, None]
        first, second = (by_head[:, head, self.planes[..., one].long()].flatten(1) for one in (0, 1))
        places = torch.arange(2 * count, dtype=torch.int16, device=bases.device)
        places = places.reshape(count, 2).expand(heads, -1, -1).contiguous()
        parts = []
        for start in range(0, factors.shape[0], _PIECE):
            piece = slice(start, start + _PIECE)
            rows = factors[piece].to(bases.dtype)
            turned = self._turned(rows @ first, rows @ second, cos[piece], sin[piece])
            parts.append(encode(turned.to(bases.dtype).reshape(len(rows), heads, -1), places))
        return _joined(self.planes, parts)

    def _turned(self, x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """float32 [t, kv_heads P, 2] of the planes' dimensions [t, kv_heads P]."""
        cos = torch.nn.functional.pad(cos.float(), (0, 1), value=1.0)[:, self._numbers]
        sin = torch.nn.functional.pad(sin.float(), (0, 1))[:, self._numbers]
        x, y = x.float(), y.float()
        return torch.stack([(x * cos).addcmul_(y, sin, value=-1), (y * cos).addcmul_(x, sin)], -1)


def _joined(planes: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> KeySketch:
    codes, scales = zip(*parts, strict=True)
    return KeySketch(planes, torch.cat(codes), torch.cat(scales))
