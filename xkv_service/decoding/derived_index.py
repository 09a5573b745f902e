"""The selection index of layers whose artifact stores none: sketches of the keys as the factors give them.

A sketch keeps a few rotary planes of a key, so only their columns of the layer bases are multiplied, and only
they are turned; the token factors of a group are unpacked once for all its layers. `derived_plainly` is the
reference: it rebuilds whole keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.placing import sent
from xkv_service.packed_factors import PackedFactors
from xkv_service.selection.sketch import KeySketch, encode

_PIECE, _DEVICE_PIECE = 16384, 65536
"""Tokens whose keys are rebuilt at once, on a CPU and elsewhere: there each piece costs launches."""
_Codes = tuple[torch.Tensor, torch.Tensor]


def derived_sketches(
    factors: torch.Tensor | PackedFactors, layers: Sequence[LayerPrefix], planes: Mapping[int, torch.Tensor]
) -> dict[int, KeySketch]:
    """By layer index, the sketches of layers that share token factors of keys.

    Args:
        factors: A [T, r]. layers: those that have an index.
        planes: by layer index, int16 [kv_heads, P, 2], the pairs of dimensions that its sketch keeps; on the
            CPU, or the device is waited for.
    """
    found: dict[int, KeySketch] = {}
    quick: dict[int, KeptPlanes] = {}
    for layer in layers:
        mine = planes[layer.layer]
        try:
            quick[layer.layer] = KeptPlanes(mine, layer)
        except KeyError:  # an artifact may name any two dimensions
            found[layer.layer] = derived_plainly(layer.keys, mine.to(layer.positions.device), layer.tokens)
    parts: dict[int, list[_Codes]] = {index: [] for index in quick}
    size = _PIECE if layers and layers[0].positions.device.type == "cpu" else _DEVICE_PIECE
    for start in range(0, factors.shape[0] if quick else 0, size):
        piece = slice(start, start + size)
        rows = factors[piece].to(layers[0].dtype)
        for index, kept in quick.items():
            parts[index].append(kept.encoded(rows, piece))
    return found | {index: _joined(kept.planes, parts[index]) for index, kept in quick.items()}


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
    """How the planes of a layer's sketch are made of token factors.

    Args:
        planes: int16 [kv_heads, P, 2], each a plane that RoPE turns or two dimensions that do not turn.

    Raises:
        KeyError: a pair that is neither.
    """

    def __init__(self, planes: torch.Tensor, layer: LayerPrefix) -> None:
        self._turns = layer.turns
        table = layer.turns.table.planes
        numbers = {tuple(pair): number for number, pair in enumerate(table.tolist())}
        turning, still = set(table.flatten().tolist()), len(table)
        pairs = [tuple(pair) for head in planes.tolist() for pair in head]
        numbers |= {pair: still for pair in pairs if turning.isdisjoint(pair)}
        device = layer.key_bases.device
        self.planes = planes = sent(planes, device)
        self._numbers = sent(torch.tensor([numbers[pair] for pair in pairs]), device)
        heads, count, _ = planes.shape
        by_head = layer.key_bases.reshape(-1, heads, layer.head_dim)
        head = torch.arange(heads, device=device)[:, None]
        sides = [by_head[:, head, planes[..., side].long()].flatten(1) for side in (0, 1)]
        columns, scales = torch.cat(sides, 1), layer.key_scales
        self._columns = columns if scales is None else columns * scales[:, None]
        places = torch.arange(2 * count, dtype=torch.int16, device=device).reshape(count, 2)
        self._places = places.expand(heads, -1, -1).contiguous()

    def encoded(self, rows: torch.Tensor, tokens: slice) -> _Codes:
        """Codes and scales of some tokens, whose token factors are `rows` [t, r]."""
        x, y = (rows @ self._columns).float().chunk(2, 1)
        cos, sin = self._turns.cos[tokens].float(), self._turns.sin[tokens].float()
        cos = torch.nn.functional.pad(cos, (0, 1), value=1.0)[:, self._numbers]
        sin = torch.nn.functional.pad(sin, (0, 1))[:, self._numbers]
        turned = torch.stack([(x * cos).addcmul_(y, sin, value=-1), (y * cos).addcmul_(x, sin)], -1)
        return encode(turned.to(rows.dtype).reshape(len(rows), len(self.planes), -1), self._places)


def _joined(planes: torch.Tensor, parts: list[_Codes]) -> KeySketch:
    codes, scales = zip(*parts, strict=True)
    return KeySketch(planes, torch.cat(codes), torch.cat(scales))
