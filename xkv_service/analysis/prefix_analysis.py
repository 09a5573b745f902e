"""One prefix: how alike its layers are, and what ranks its groups of layers have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xkv_service.analysis.chunks import ReadChunk
from xkv_service.analysis.cka import linear_cka
from xkv_service.analysis.spectra import GroupSpectrum, group_spectra
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.prefilling.prefilled import Prefill

GROUP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class SideAnalysis:
    """Keys or values of one prefix.

    Args:
        cka: float64 [L, L] over the compressible layers, in order.
        spectra: by group size, every complete group.
    """

    cka: torch.Tensor
    spectra: dict[int, list[GroupSpectrum]]


@dataclass(frozen=True, eq=False)
class PrefixAnalysis:
    """Both sides of one prefix.

    Args:
        name: of the document. tokens: T.
        layers: indices of the compressible layers.
        keys: before RoPE. values: as cached.
    """

    name: str
    tokens: int
    layers: tuple[int, ...]
    keys: SideAnalysis
    values: SideAnalysis


@torch.no_grad()
def analyze_prefix(exact: Prefill, name: str, sizes: Sequence[int] = GROUP_SIZES) -> PrefixAnalysis:
    """Analyze an exact prefill; it is left as it was.

    Args:
        sizes: layers in a group; those larger than the model are left out.
    """
    layout = exact.layout
    return PrefixAnalysis(
        name=name,
        tokens=exact.tokens,
        layers=tuple(layer.index for layer in layout.compressible),
        keys=_side(exact.keys, layout, lambda layer: layer.key_width, exact.tokens, sizes),
        values=_side(exact.values, layout, lambda layer: layer.value_width, exact.tokens, sizes),
    )


def _side(
    read: ReadChunk,
    layout: ModelLayout,
    width_of: Callable[[LayerLayout], int],
    tokens: int,
    sizes: Sequence[int],
) -> SideAnalysis:
    layers = layout.compressible
    cka = linear_cka(read, [layer.index for layer in layers], [width_of(layer) for layer in layers], tokens)
    spectra: dict[int, list[GroupSpectrum]] = {}
    for run in layout.groups(max(sizes)):
        found = group_spectra(read, [one.index for one in run], [width_of(one) for one in run], tokens, sizes)
        for size, groups in found.items():
            if groups:
                spectra.setdefault(size, []).extend(groups)
    return SideAnalysis(cka, dict(sorted(spectra.items())))
