"""`CompressionSpec`: every choice that shapes an artifact's bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer, is_number

Rank = int | Literal["full"]
StoredDtype = Literal["bfloat16", "float16", "float32"]
FactorDtype = Literal["mixed", "int4", "int8", "bfloat16", "float16", "float32"]
Basis = Literal["document", "calibrated"]
IndexKind = Literal["derived", "sketch", "landmark", "none"]

DEFAULT_RATIO = 8.0
MOST_RATIO = 1000
STORED_INDEX_RATIO = 8.0
"""Up to here the index is stored where nothing is said about it (docs/defaults.md)."""
COLUMN_BITS = {"mixed": (2, 4, 8), "int4": (4,), "int8": (8,)}
"""With a calibration: bits that a column of token factors may have, by `factor_dtype`."""


@dataclass(frozen=True)
class CompressionSpec:
    """How a prefix is compressed. Two specs that differ in any field make two artifacts.

    Args:
        group_size: adjacent compressible layers that share token factors (paper, section 3.2: 4).
        ratio: target of bytes of the exact cache / bytes stored, everything counted (token factors, layer
            bases, selection index, exact tokens). Default 8 when no ranks are given.
        rank_k, rank_v: ranks per group instead of a ratio; "full" keeps every direction.
        key_share: share of keys in the rank budget, r_k / (r_k + r_v); 0.4 is the paper's 1:1.5.
        dtype: of layer bases, landmarks and exact tokens as stored.
        factor_dtype: of token factors as stored; "int8" has one scale a column, folded into the layer bases.
            With a calibration: "mixed" gives each column 2, 4 or 8 bits, "int4" and "int8" all the same.
        index: selection index: per-token key "sketch", stored or "derived" from the factors when they are
            loaded, chunk "landmark" (paper, section 3.3), or "none". Left out: a stored sketch up to a ratio
            of 8, whose bytes cost nothing there, and a derived one above.
            Latent layers (MLA) store none: their factors are one. They have no use for rank_v, key_share
            and weights either.
        sketch_planes: rotary planes (pairs of dimensions) per KV head in a key sketch, 4 bits a dimension.
        landmark_chunk: tokens per landmark (paper: 8).
        sink, recent: first and last tokens of the prefix kept exact.
        outlier_chunks: chunks of `landmark_chunk` tokens least like their mean, kept exact (paper: 48).
        key_weights: "query" weights each KV head's rotary planes by the energy of its queries there.
        value_weights: "output" weights each KV head's values by its output projections.
        calibration: id of the calibration that groups, weights, bits and planes come from, instead of
            `group_size`, `key_share` and the weights above.
        basis: whose layer bases: the "document"'s own, or the "calibrated" ones that all documents share.
        base_dtype: of a document's own layer bases: "int8" has one scale a row; None is `dtype`.
        reuse: ascending indices of layers without a selection index: they attend to the tokens that the
            full-attention layer before them chose (`selection.reuse`).

    Raises:
        InvalidSpec: a field is out of range.
    """

    group_size: int = 4
    ratio: float | None = None
    rank_k: Rank | None = None
    rank_v: Rank | None = None
    key_share: float = 0.4
    dtype: StoredDtype = "bfloat16"
    factor_dtype: FactorDtype = "int8"
    index: IndexKind | None = None
    sketch_planes: int = 8
    landmark_chunk: int = 8
    sink: int = 4
    recent: int = 0
    outlier_chunks: int = 0
    key_weights: Literal["none", "query"] = "none"
    value_weights: Literal["none", "output"] = "none"
    calibration: str | None = None
    basis: Basis = "document"
    base_dtype: Literal["int8"] | None = None
    reuse: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank_k is None and self.rank_v is None and self.ratio is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        self._check_target()
        if self.index is None:
            stored = self.ratio is None or self.ratio <= STORED_INDEX_RATIO
            object.__setattr__(self, "index", "sketch" if stored else "derived")
        self._check_counts()
        self._check_choices()
        self._check_calibration()
        self._check_reuse()

    def _check_target(self) -> None:
        if (self.rank_k is None) != (self.rank_v is None):
            raise InvalidSpec(
                "rank_k and rank_v go together: only one was given",
                hint="give both, or a ratio instead",
            )
        if self.ratio is not None and self.rank_k is not None:
            raise InvalidSpec("a ratio and ranks were both given", hint="give one or the other")
        if self.ratio is not None and not (is_number(self.ratio) and 1.0 <= self.ratio <= MOST_RATIO):
            raise InvalidSpec(
                f"ratio={self.ratio!r} is out of range", hint=f"use a number from 1 to {MOST_RATIO}"
            )
        for name, rank in (("rank_k", self.rank_k), ("rank_v", self.rank_v)):
            if rank not in (None, "full") and not (is_integer(rank) and rank >= 1):
                raise InvalidSpec(f"{name}={rank!r} is no rank", hint='use an integer from 1, or "full"')
        if not (is_number(self.key_share) and 0.0 < self.key_share < 1.0):
            raise InvalidSpec(
                f"key_share={self.key_share!r} is out of range", hint="use a number between 0 and 1"
            )

    def _check_counts(self) -> None:
        for name, low, high in (
            ("group_size", 1, 1024),
            ("sketch_planes", 1, 1024),
            ("landmark_chunk", 1, 1024),
            ("sink", 0, 65536),
            ("recent", 0, 65536),
            ("outlier_chunks", 0, 65536),
        ):
            value = getattr(self, name)
            if not is_integer(value) or not low <= value <= high:
                raise InvalidSpec(
                    f"{name}={value!r} is out of range", hint=f"use an integer from {low} to {high}"
                )

    def _check_choices(self) -> None:
        for name, allowed in (
            ("dtype", ("bfloat16", "float16", "float32")),
            ("factor_dtype", ("mixed", "int4", "int8", "bfloat16", "float16", "float32")),
            ("index", ("derived", "sketch", "landmark", "none")),
            ("key_weights", ("none", "query")),
            ("value_weights", ("none", "output")),
            ("basis", ("document", "calibrated")),
            ("base_dtype", (None, "int8")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidSpec(
                    f"{name}={getattr(self, name)!r} is unknown",
                    hint=f"use one of {', '.join(map(str, allowed))}",
                )

    def _check_calibration(self) -> None:
        if self.basis == "calibrated" and self.base_dtype is not None:
            raise InvalidSpec(
                f"base_dtype={self.base_dtype!r}: a calibration's bases are not stored with the document",
                hint="leave it out, or use basis='document'",
            )
        if self.calibration is None:
            if self.basis == "calibrated" or self.factor_dtype in ("mixed", "int4"):
                raise InvalidSpec(
                    f"basis={self.basis!r}, factor_dtype={self.factor_dtype!r}: there is no calibration",
                    hint="name one, or use basis='document' and factor_dtype='int8'",
                )
            return
        if not (isinstance(self.calibration, str) and 0 < len(self.calibration) <= 64):
            raise InvalidSpec(f"calibration={self.calibration!r} is no id", hint="use a calibration's id")
        if self.ratio is None or self.factor_dtype not in COLUMN_BITS:
            raise InvalidSpec(
                "a calibration chooses ranks and bits by itself",
                hint="give a ratio, no ranks, and factor_dtype mixed, int4 or int8",
            )

    def over(self, basis: Basis) -> CompressionSpec:
        """The same over the document's own bases, which have 8 bits then, or over the calibration's."""
        return replace(self, basis=basis, base_dtype="int8" if basis == "document" else None)

    def _check_reuse(self) -> None:
        layers = self.reuse
        if not isinstance(layers, list | tuple) or not all(is_integer(one) and one >= 0 for one in layers):
            raise InvalidSpec(f"reuse={layers!r} is out of range", hint="use layer indices, ascending")
        if list(layers) != sorted(set(layers)):
            raise InvalidSpec(f"reuse={layers!r} is not in order", hint="use layer indices, ascending")
        if layers and (self.index == "none" or self.outlier_chunks):
            raise InvalidSpec(
                f"reuse={layers!r} with index={self.index!r} and outlier_chunks={self.outlier_chunks}: "
                "layers share a choice where there is an index and all keep the same tokens exact",
                hint="leave reuse out",
            )
        object.__setattr__(self, "reuse", tuple(layers))

    def canonical(self) -> dict[str, Any]:
        """The spec as plain JSON values: what artifact ids are made from.

        Every field is present, but for those that came later and say nothing: ids stay what they were.
        """
        fields = asdict(self)
        if self.calibration is None:
            del fields["calibration"], fields["basis"]
        if self.base_dtype is None:
            del fields["base_dtype"]
        del fields["reuse"]
        return {**fields, "reuse": list(self.reuse)} if self.reuse else fields

    @classmethod
    def from_canonical(cls, fields: dict[str, Any]) -> CompressionSpec:
        """The spec that `canonical` was called on.

        Raises:
            InvalidSpec: an unknown field or a value out of range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise InvalidSpec(f"not a compression spec: {error}") from None
