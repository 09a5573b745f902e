"""Numbers as a reader sees them."""

from __future__ import annotations

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
GAP = "\u00a0"
"""A space that a line does not break at."""

_LEAST = 1e-300
"""Of anything measured. Below it are powers of ten that a float cannot be divided by."""


def power(exponent: int) -> str:
    """10 to the power of `exponent`, as an axis has it."""
    return {0: "1", -1: "0.1", 1: "10"}.get(exponent, "10" + str(exponent).translate(_RAISED))


def short(value: float) -> str:
    """Two significant digits; a power of ten where there would be many zeros."""
    if abs(value) < _LEAST:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        exponent = _exponent(value)
        return f"{value / 10.0**exponent:.1f}{GAP}×{GAP}10{str(exponent).translate(_RAISED)}"
    digits = max(0, 1 - _exponent(value))
    return f"{float(f'{value:.1e}'):,.{digits}f}"


def nats(value: float, error: float | None = None) -> str:
    """A divergence, with its standard error in the same power of ten."""
    if not error or max(value, error) < _LEAST:
        return short(value)
    exponent = _exponent(max(value, error))
    scale = 1.0 if -3 <= exponent < 6 else 10.0**exponent
    digits = max(0, -_exponent(error / scale), 1 - _exponent(max(value, error) / scale))
    both = f"{value / scale:,.{digits}f}{GAP}±{GAP}{error / scale:,.{digits}f}"
    return both if scale == 1.0 else f"({both}){GAP}×{GAP}10{str(exponent).translate(_RAISED)}"


def _exponent(value: float) -> int:
    return int(f"{value:.1e}".split("e")[1])


def percent(share: float) -> str:
    """A share in percent; never 100 % of what is not all."""
    shown = f"{100 * share:.1f}".removesuffix(".0")
    return f">{GAP}99.9{GAP}%" if shown == "100" and share < 1 else f"{shown}{GAP}%"


def times(ratio: float) -> str:
    """A compression ratio."""
    return f"{ratio:.4g}x"


def counted(number: float, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number:,g}{GAP}{noun}{'' if number == 1 else 's'}" if number < 1e6 else f"{number:,.0f} {noun}s"


def span(layers: tuple[int, ...]) -> str:
    """Layers by their first and last."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
