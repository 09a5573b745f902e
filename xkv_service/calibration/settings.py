"""`CalibrationSettings`: every choice that shapes a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xkv_service.calibration.metrics import WEIGHTINGS, Weighting
from xkv_service.errors import InvalidSpec, RatioUnreachable
from xkv_service.modeling.layout import LayerLayout
from xkv_service.numeric import is_integer, is_number
from xkv_service.selection.spec import SelectionSpec

_MOST_RATIO_LATENT = 4.0
"""3.0 in DeepSeek-V3: latents are compressed less, so more of their directions are used."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. Defaults: docs/calibration.md.

    Args:
        ratio: bytes of the exact cache / bytes stored at which choices are made.
        ratios: at which the result is validated besides.
        group_size: most neighbours that share token factors.
        weightings: metrics to try.
        tolerance_documents: documents that tolerances are measured on.
        held_out: share of the documents that choices are tried on and bases are not made from, 0.5 at most.
        most_ratio: the ratio whose plan decides how many directions are kept: lower ones get more bits for
            the same directions.
        selection: how tokens are chosen while decoding in every trial.

    Raises:
        InvalidSpec: a field is out of range.
    """

    ratio: float = 48.0
    ratios: tuple[float, ...] = (8.0, 20.0, 32.0, 48.0)
    group_size: int = 4
    weightings: tuple[Weighting, ...] = WEIGHTINGS
    tolerance_documents: int = 3
    held_out: float = 0.25
    most_ratio: float = 12.0
    selection: SelectionSpec = field(default_factory=SelectionSpec)

    @classmethod
    def of(
        cls, layers: Sequence[LayerLayout], ratio: float | None = None, group_size: int | None = None
    ) -> CalibrationSettings:
        """The defaults for a model of these layers, but for what is given.

        Latent attention (MLA) keeps a part of each token exact, so there the default ratios are those of the
        rest: 48 becomes 7.7 in DeepSeek-V3.

        Raises:
            InvalidSpec: a value out of range.
            RatioUnreachable: what is kept exact leaves no such ratio.
        """
        exact = exact_share(layers)
        if ratio is not None and ratio * exact >= 1:
            raise RatioUnreachable(
                f"ratio={ratio:g} cannot be reached: {exact:.1%} of the cache are rotated keys, kept exact",
                hint=f"use a ratio below {1 / exact:.1f}",
            )

        def stored(asked: float) -> float:
            return asked if not exact else round(1 / (exact + (1 - exact) / asked), 2)

        ratios = {stored(one) for one in cls.ratios} | ({ratio} if ratio is not None else set())
        return cls(
            ratio=stored(cls.ratio) if ratio is None else ratio,
            ratios=tuple(sorted(ratios)),
            group_size=cls.group_size if group_size is None else group_size,
            weightings=("plain", "tolerance", "tolerance+both") if exact else WEIGHTINGS,
            most_ratio=stored(_MOST_RATIO_LATENT) if exact else cls.most_ratio,
        )

    @property
    def held_out_every(self) -> int:
        """Of so many documents one is held out."""
        return max(2, round(1 / self.held_out))

    def __post_init__(self) -> None:
        for name in ("ratio", "ratios", "most_ratio"):
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            self._check(
                name, all(is_number(one) and 1 <= one <= 1000 for one in each), "numbers from 1 to 1000"
            )
        size, count = self.group_size, self.tolerance_documents
        self._check("group_size", is_integer(size) and 1 <= size <= 1024, "an integer from 1 to 1024")
        self._check("tolerance_documents", is_integer(count) and count >= 1, "an integer from 1")
        share = self.held_out
        self._check("held_out", is_number(share) and 0 < share <= 0.5, "a share of 0.5 at most")
        known = bool(self.weightings) and set(self.weightings) <= set(WEIGHTINGS)
        self._check("weightings", known, f"some of {', '.join(WEIGHTINGS)}")

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise InvalidSpec(f"{name}={getattr(self, name)!r} is out of range", hint=f"use {wanted}")


def exact_share(layers: Sequence[LayerLayout]) -> float:
    """Share of the cached numbers of a token that is kept as it is: the rotated keys of latent attention."""
    exact = sum(layer.value_width for layer in layers if layer.kind == "latent")
    return exact / sum(layer.key_width + layer.value_width for layer in layers)
