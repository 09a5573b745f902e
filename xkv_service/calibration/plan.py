"""What a calibration makes of a budget: columns and bits of every group's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from xkv_service.calibration.allocation import Offers
from xkv_service.calibration.calibration import Calibration, SharedBasis
from xkv_service.modeling.layout import CACHE_NUMBER_BYTES, LayerLayout
from xkv_service.packed_factors import Runs
from xkv_service.spec import COLUMN_BITS, CompressionSpec
from xkv_service.stored import base_dtype

_SCALE_BITS = 32


def factor_bits(layers: Sequence[LayerLayout], ratio: float) -> float:
    """Bits of a token that are left for token factors at a ratio; 0 where none are.

    Of all else that is stored only the exact rotated keys of latent attention (MLA) are taken off: they grow
    with the tokens, and are a ninth of what DeepSeek-V3 caches.
    """
    full = sum(layer.key_width + layer.value_width for layer in layers)
    exact = sum(layer.value_width for layer in layers if layer.kind == "latent")
    return 8 * CACHE_NUMBER_BYTES * max(0.0, full / ratio - exact)


class ColumnPlan:
    """Columns of a document of `tokens` tokens; one with its own bases pays for them over so many."""

    def __init__(self, calibration: Calibration, spec: CompressionSpec, tokens: int) -> None:
        own = spec.basis == "document"
        self._kinds = [group.kinds for group in calibration.groups]
        parts = [group.basis(kind) for group in calibration.groups for kind in group.kinds]
        width = max(part.bases.shape[1] for part in parts)
        row_bits = _base_bits(spec) * width if own else 0
        scale_bits = _SCALE_BITS if not own or spec.base_dtype else 0
        column_bits = (row_bits + scale_bits) / tokens
        energies = [part.energies[: _most(part, tokens, own=own)] for part in parts]
        self._offers = Offers(energies, COLUMN_BITS[spec.factor_dtype], column_bits)

    def runs(self, bits_per_token: float) -> list[tuple[Runs, Runs]]:
        """Columns and bits of the keys and of the values of each group, for so many bits in all; latents are
        keys without values: ().
        """
        found = iter(self._offers.runs(bits_per_token))
        return [(next(found), next(found) if "value" in kinds else ()) for kinds in self._kinds]


def _base_bits(spec: CompressionSpec) -> int:
    return 8 * base_dtype(spec).itemsize


def _most(part: SharedBasis, tokens: int, *, own: bool) -> int:
    """The highest rank: the directions that the calibration holds, or all that a document has."""
    return min(part.bases.shape[1], tokens) if own else part.bases.shape[0]
