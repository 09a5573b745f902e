"""What a calibration makes of a budget: columns and bits of every group's keys and values."""

from __future__ import annotations

from xkv_service.calibration.allocation import Offers
from xkv_service.calibration.calibration import KINDS, Calibration, SharedBasis
from xkv_service.packed_factors import Runs
from xkv_service.spec import COLUMN_BITS, CompressionSpec
from xkv_service.stored import base_dtype

_SCALE_BITS = 32


class ColumnPlan:
    """Columns of a document of `tokens` tokens; one with its own bases pays for them over so many."""

    def __init__(self, calibration: Calibration, spec: CompressionSpec, tokens: int) -> None:
        own = spec.basis == "document"
        parts = [group.basis(kind) for group in calibration.groups for kind in KINDS]
        width = max(part.bases.shape[1] for part in parts)
        row_bits = _base_bits(spec) * width if own else 0
        scale_bits = _SCALE_BITS if not own or spec.base_dtype else 0
        column_bits = (row_bits + scale_bits) / tokens
        energies = [part.energies[: _most(part, tokens, own=own)] for part in parts]
        self._offers = Offers(energies, COLUMN_BITS[spec.factor_dtype], column_bits)

    def runs(self, bits_per_token: float) -> list[tuple[Runs, Runs]]:
        """Columns and bits of the keys and of the values of each group, for so many bits in all."""
        found = self._offers.runs(bits_per_token)
        return list(zip(found[0::2], found[1::2], strict=True))


def _base_bits(spec: CompressionSpec) -> int:
    return 8 * base_dtype(spec).itemsize


def _most(part: SharedBasis, tokens: int, *, own: bool) -> int:
    """The highest rank: the directions that the calibration holds, or all that a document has."""
    return min(part.bases.shape[1], tokens) if own else part.bases.shape[0]
