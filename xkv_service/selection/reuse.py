"""Which layers have no selection index: they attend to the tokens that the layer before them chose.

"Before" is in the order of the full-attention layers, whatever windows and states stand between them. Both
must have the same heads, so that what one chose for a head or a query means the same to the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from xkv_service.errors import InvalidSpec
from xkv_service.modeling.layout import LayerLayout

Heads = tuple[int, ...]


def followers(layers: Sequence[LayerLayout]) -> frozenset[int]:
    """Indices of the layers that could do without an index.

    Args:
        layers: the compressible ones, in order. Latent layers have an index that costs nothing.
    """
    heads = [(one.kv_heads, one.query_heads) if one.kind == "full" else () for one in layers]
    return following([one.index for one in layers], heads)


def following(indices: Sequence[int], heads: Sequence[Heads]) -> frozenset[int]:
    """Those of `indices` whose layer has the same heads as the one before; empty heads are like none."""
    pairs = zip(indices[1:], heads, heads[1:], strict=False)
    return frozenset(index for index, before, mine in pairs if mine and mine == before)


def refuse_reuse(reuse: Collection[int], possible: Collection[int]) -> None:
    """Refuse layers that cannot reuse a choice.

    Raises:
        InvalidSpec: names them.
    """
    wrong = sorted(set(reuse) - set(possible))
    if wrong:
        raise InvalidSpec(
            f"reuse={wrong}: no full-attention layer of the same heads stands before these layers",
            hint=f"use some of {sorted(possible)}, or leave reuse out",
        )
