"""What a calibration makes of a budget: columns and bits of every group's keys and values."""

from __future__ import annotations

from xkv_service.calibration.allocation import allocate
from xkv_service.calibration.calibration import KINDS, Calibration, SharedBasis
from xkv_service.packed_factors import Runs
from xkv_service.spec import CompressionSpec

_CHOICES = {"mixed": (2, 4, 8), "int4": (4,), "int8": (8,)}
_BASE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


def column_runs(
    calibration: Calibration, spec: CompressionSpec, tokens: int, bits_per_token: float
) -> list[tuple[Runs, Runs]]:
    """Columns and bits of the keys and of the values of each group.

    Args:
        tokens: T; a document that stores its own bases pays for them over so many tokens.
        bits_per_token: for all groups together.
    """
    own = spec.basis == "document"
    parts = [group.basis(kind) for group in calibration.groups for kind in KINDS]
    width = max(part.bases.shape[1] for part in parts)
    column_bits = _BASE_BITS[spec.dtype] * width / tokens if own else 32 / tokens
    energies = [part.energies[: _most(part, tokens, own=own)] for part in parts]
    runs = allocate(energies, bits_per_token, _CHOICES[spec.factor_dtype], column_bits)
    return list(zip(runs[0::2], runs[1::2], strict=True))


def _most(part: SharedBasis, tokens: int, *, own: bool) -> int:
    """The highest rank: the directions that the calibration holds, or all that a document has."""
    return min(part.bases.shape[1], tokens) if own else part.bases.shape[0]
