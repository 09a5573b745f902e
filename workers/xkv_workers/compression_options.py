"""How to compress, as a person asks for it. What is left open depends on whether there is a calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from xkv_service.errors import InvalidSpec
from xkv_service.spec import DEFAULT_RATIO, CompressionSpec, FactorDtype, Rank

if TYPE_CHECKING:
    from xkv_service.calibration.calibration import Calibration

_FACTOR_DTYPES: dict[str, FactorDtype] = {"mixed": "mixed", "4": "int4", "8": "int8"}


@dataclass(frozen=True)
class CompressionOptions:
    """Options that make a `CompressionSpec`, once it is known which calibration there is.

    Args:
        ratio: bytes of the exact cache / bytes stored; None is 8, where no ranks are given.
        rank_k, rank_v, group_size: what a calibration chooses otherwise: with one of them there is none.
        calibration: "auto" for the model's newest, "none", or an id (its first digits).
        basis, bits: None is what the calibration's validation found best at the ratio; without a calibration
            "document" and "8".

    Raises:
        InvalidSpec: a value out of range, or options that do not go together.
    """

    ratio: float | None = None
    rank_k: Rank | None = None
    rank_v: Rank | None = None
    group_size: int | None = None
    calibration: str = "auto"
    basis: Literal["calibrated", "document"] | None = None
    bits: Literal["mixed", "4", "8"] | None = None

    def __post_init__(self) -> None:
        self._plain()
        by_hand = self._by_hand
        if by_hand and self.calibration not in ("auto", "none"):
            raise InvalidSpec(
                f"a calibration and {by_hand} were both given: a calibration chooses groups and ranks itself",
                hint="give one or the other",
            )
        if not self.may_calibrate:
            self._refuse_calibrated(f"with {by_hand or 'calibration none'} there is no calibration")

    @property
    def may_calibrate(self) -> bool:
        """Whether a calibration is used where there is one."""
        return self.calibration != "none" and not self._by_hand

    def spec(self, calibration: Calibration | None) -> CompressionSpec:
        """The spec with this calibration, or without any.

        Raises:
            InvalidSpec: there is none, and the options need one.
        """
        if calibration is None:
            self._refuse_calibrated("the store has no calibration of this model")
            return self._plain()
        from xkv_service.calibration.choice import best_spec

        best = best_spec(DEFAULT_RATIO if self.ratio is None else self.ratio, calibration)
        factor_dtype = _FACTOR_DTYPES[self.bits] if self.bits else best.factor_dtype
        return replace(best.over(self.basis or best.basis), factor_dtype=factor_dtype)

    @property
    def _by_hand(self) -> str:
        named = (("rank_k", self.rank_k), ("rank_v", self.rank_v), ("group_size", self.group_size))
        return " and ".join(name for name, value in named if value is not None)

    def _plain(self) -> CompressionSpec:
        group_size = CompressionSpec.group_size if self.group_size is None else self.group_size
        spec = CompressionSpec(
            group_size=group_size, ratio=self.ratio, rank_k=self.rank_k, rank_v=self.rank_v
        )
        return spec.over("document")

    def _refuse_calibrated(self, why: str) -> None:
        wanted = [f"basis {self.basis}"] if self.basis == "calibrated" else []
        wanted += [f"bits {self.bits}"] if self.bits in ("mixed", "4") else []
        if wanted:
            raise InvalidSpec(f"{' and '.join(wanted)}: {why}", hint="see `xkv calibrate`, or leave it out")
