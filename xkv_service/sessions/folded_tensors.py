"""The folded part of a tail as tensors by name (docs/format.md) and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from xkv_artifacts.errors import CorruptArtifact
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.folded_prefix import FoldedPart, FoldedPrefix, FoldedRows
from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.scoring import SketchScorer
from xkv_service.decoding.select import Selection
from xkv_service.errors import CacheMisuse
from xkv_service.selection.sketch import KeySketch

_Tensors = Mapping[str, torch.Tensor]


def folded_counts(cache: Any) -> tuple[int, ...]:
    """Tokens of each folded part, in order; none with an exact cache.

    Raises:
        CacheMisuse: folding was interrupted, so that layers differ.
    """
    if not isinstance(cache, XKVCache):
        return ()
    counts = {
        tuple(part.tokens for part in _parts(cache, layer)) for group in _groups(cache) for layer in group
    }
    if len(counts) != 1:
        raise CacheMisuse("folding this tail was interrupted", hint="fold it again first")
    return counts.pop()


def folded_tensors(cache: XKVCache) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows and bases of every group's folded tokens, and each layer's index of them."""
    for number, group in enumerate(_groups(cache)):
        for place, part in enumerate(_parts(cache, group[0])):
            for kind, rows in (("key", part.keys), ("value", part.values)):
                name = f"fold.{place}.group.{number}.{kind}"
                yield f"{name}.factors", rows.integers
                yield f"{name}.scales", rows.scales
                yield f"{name}.bases", rows.extra_bases
        for layer in group:
            for place, part in enumerate(_parts(cache, layer)):
                if part.sketch is not None:
                    yield f"fold.{place}.layer.{layer}.sketch.codes", part.sketch.codes
                    yield f"fold.{place}.layer.{layer}.sketch.scales", part.sketch.scales


def fill_folded(cache: XKVCache, counts: Sequence[int], tensors: _Tensors) -> None:
    """Put folded tokens behind the prefix of a cache without a tail.

    Args:
        counts: as `folded_counts`. tensors: as `folded_tensors` gives them, not trusted.

    Raises:
        CorruptArtifact: a tensor is missing, unknown, or not of this prefix's and these tokens' shape.
    """
    left = {name: tensor.to(cache.prefix.model.device) for name, tensor in tensors.items()}
    for place, count in enumerate(counts):
        turns: dict[int, Turns] = {}
        for number, group in enumerate(_groups(cache)):
            _fill_group(cache, group, _Taken(left, f"fold.{place}", number, count), turns)
    if left:
        raise CorruptArtifact(f"tensor {min(left)[:80]}: unknown")


class _Taken:
    """Takes the checked tensors of one group's part."""

    def __init__(self, tensors: dict[str, torch.Tensor], start: str, group: int, count: int) -> None:
        self._tensors, self._start, self._group, self.count = tensors, start, group, count

    def rows(self, kind: str, rank: int, width: int) -> FoldedRows:
        """Rows over `rank` known bases and as many more as the bases say."""
        name = f"group.{self._group}.{kind}"
        extra = self._tensors.get(f"{self._start}.{name}.bases", torch.empty(0, 0)).shape[0]
        return FoldedRows(
            self._take(f"{name}.factors", torch.int8, self.count, rank + extra),
            self._take(f"{name}.scales", torch.float32, rank + extra),
            self._take(f"{name}.bases", torch.bfloat16, extra, width),
        )

    def sketch(self, base: LayerPrefix) -> KeySketch | None:
        """The index of one layer, over the planes of the prefix's."""
        if not isinstance(base.index, SketchScorer):
            return None
        planes, name = base.index.planes, f"layer.{base.layer}.sketch"
        codes = self._take(f"{name}.codes", torch.uint8, self.count, *planes.shape[:2])
        return KeySketch(planes, codes, self._take(f"{name}.scales", torch.float16, self.count, len(planes)))

    def _take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        name = f"{self._start}.{name}"
        tensor = self._tensors.pop(name, None)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise CorruptArtifact(f"tensor {name}: must be {dtype} of shape {list(shape)}")
        return tensor


def _fill_group(cache: XKVCache, group: Sequence[int], taken: _Taken, turns: dict[int, Turns]) -> None:
    bases = [_base(cache, layer) for layer in group]
    all_k = _columns([base.key_bases.shape[1] for base in bases])
    all_v = _columns([base.value_bases[:, 0].numel() for base in bases])
    keys = taken.rows("key", len(bases[0].key_bases), all_k[-1].stop)
    values = taken.rows("value", bases[0].value_bases.shape[1], all_v[-1].stop)
    for layer, base, columns_k, columns_v in zip(group, bases, all_k, all_v, strict=True):
        part = FoldedPart(keys, values, columns_k, columns_v, taken.sketch(base))
        parts = (*_parts(cache, layer), part)
        end = base.tokens + sum(one.tokens for one in parts)
        if id(base.turns) not in turns:
            turns[id(base.turns)] = Turns(base.turns.table, end, base.positions.device)
        folded = FoldedPrefix(base, parts, turns[id(base.turns)])
        reuses = cache.layers[layer].selection.reuses
        cache.layers[layer].selection = Selection(folded, cache.selection, reuses=reuses)


def _columns(widths: list[int]) -> list[slice]:
    """Columns of layers that stand side by side."""
    starts = [sum(widths[:place]) for place in range(len(widths))]
    return [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]


def _groups(cache: XKVCache) -> tuple[tuple[int, ...], ...]:
    return cache.prefix.groups


def _parts(cache: XKVCache, layer: int) -> tuple[FoldedPart, ...]:
    prefix = cache.layers[layer].selection.prefix
    return prefix.parts if isinstance(prefix, FoldedPrefix) else ()


def _base(cache: XKVCache, layer: int) -> LayerPrefix:
    base = cache.prefix.layers[layer]
    if not isinstance(base, LayerPrefix):
        raise CorruptArtifact("session: tails of latent attention are not folded")
    return base
