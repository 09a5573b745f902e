"""One layer's documents for a batch of sessions: what kernels find by address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.scoring import LandmarkScorer, Scorer, SketchScorer
from xkv_service.kernels.addresses import addresses, numbers, table, upload
from xkv_service.kernels.factor_rows import SHAPE, FactorRows
from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch

CLOSED, CHOOSABLE, ALWAYS = 0, 1, 2
"""States of a token: kept exact elsewhere; to be chosen by its share; rebuilt for every query."""


@dataclass(frozen=True)
class IndexLayout:
    """What indexes of one launch have in common.

    Args:
        planes: that sketches keep of a head. landmarks: dtype of landmarks, or None: they are sketches.
        unit: tokens that have one share, those of a landmark.
    """

    planes: int = 0
    landmarks: torch.dtype | None = None
    unit: int = 1


@dataclass(frozen=True)
class DocumentLayer:
    """One layer of one document on the device.

    Args:
        index: of T tokens, contiguous. states: uint8 [T], one of the states above.
        key_rows, value_rows: token factors of T tokens, the same tensors for all layers of a group.
        key_bases: [r_k, kv_heads D], rows contiguous. value_bases: [kv_heads, r_v, Dv], the last dimension
            contiguous. Both in the dtype of products.
        key_scales, value_scales: [r_k], [r_v] in that dtype, which the rows of the bases are still to be
            multiplied with, or None.
    """

    index: KeySketch | Landmarks
    states: torch.Tensor
    key_rows: FactorRows
    value_rows: FactorRows
    key_bases: torch.Tensor
    value_bases: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layer: LayerPrefix, key_rows: FactorRows, value_rows: FactorRows, always: torch.Tensor,
        index: Scorer | None = None,
    ) -> DocumentLayer:  # fmt: skip
        """A layer of a prefix as `XKVCache` decodes from it.

        Args:
            key_rows, value_rows: `FactorRows.of` its group's factors. always: int64, positions that are
                rebuilt for every query. index: of the layer whose choice this one takes; by default its own.

        Raises:
            ValueError: it has neither a key sketch nor landmarks.
        """
        states = torch.zeros(layer.tokens, dtype=torch.uint8, device=layer.positions.device)
        states[layer.positions] = CHOOSABLE
        states[always] = ALWAYS
        return cls(
            _contiguous(index or layer.index), states, key_rows, value_rows, _rowwise(layer.key_bases),
            _rowwise(layer.value_bases), layer.key_scales, layer.value_scales,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """T."""
        return self.states.numel()

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What must be alike in one launch: ranks need not be."""
        keys, values = self.key_bases, self.value_bases
        return (
            self.key_rows.layout.widths, self.value_rows.layout.widths, keys.shape[1], values.shape[::2],
            keys.stride(0), values.stride(1), keys.dtype, values.dtype, self.key_scales is None,
            self.value_scales is None, self.index_layout,
        )  # fmt: skip

    @property
    def index_layout(self) -> IndexLayout:
        """What scores of its index are compiled for."""
        if isinstance(self.index, Landmarks):
            return IndexLayout(landmarks=self.index.means.dtype, unit=self.index.chunk)
        return IndexLayout(planes=self.index.planes.shape[1])

    @cached_property
    def without_tokens(self) -> DocumentLayer:
        """The same tensors, and one token that nobody may choose."""
        return replace(self, states=self.states.new_full((1,), CLOSED))

    @cached_property
    def shape(self) -> list[int]:
        """Its row of `DocumentTable.key_shapes`."""
        keys, values = self.key_rows.layout.counts, self.value_rows.layout.counts
        return [*keys, 0, *values, self.value_bases.stride(0)]

    @cached_property
    def addresses(self) -> list[int]:
        """In the order of a table's rows.

        Raises:
            ValueError: strided tensors.
        """
        contiguous = (*read_by_scores(self.index), self.states)
        bases = (self.key_bases, self.value_bases)
        if not all(t.is_contiguous() for t in contiguous) or any(t.stride(-1) != 1 for t in bases):
            raise ValueError("kernels read contiguous indexes, and bases whose rows are contiguous")
        scales = (self.key_scales, self.value_scales)
        scaled = [base if scale is None else scale for scale, base in zip(scales, bases, strict=True)]
        return addresses([*contiguous, self.key_rows.data, self.value_rows.data, *bases, *scaled])


class DocumentTable:
    """One layer's documents, one for each session of a batch, which decodes from it.

    The tables are tensors on the device, which a captured CUDA graph reads anew: `overwrite` them to run it
    for other documents.

    Args:
        documents: of one layout, in the order of the sessions; each has ranks of its own. Sessions on one
            document list it each.
        budgets: tokens to choose for each session, of whole units.

    Attributes:
        documents: kept alive for the kernels, until `forget`.
        index: int64 [3 or 1, sessions], addresses of the codes, scales and planes of sketches, or of means.
        states, key_rows, value_rows, key_bases, value_bases, key_scales, value_scales: int64 [sessions],
            addresses.
        lengths, budgets: int32 [sessions].
        key_shapes: int32 [sessions, SHAPE], columns of A_k of each width, and nothing; then what begins
            `value_shapes`: columns of A_v of each width, and numbers from one head of the value bases to the
            next.
        key_widths, value_widths: `RowLayout.arguments` of all rows. dtype: of matrix products.
        key_stride, value_stride: numbers from one row of the key bases to the next, and of a head's values.
        kv_heads, dim, value_dim, index_layout: of the layer. value_rank: the largest.

    Raises:
        ValueError: documents of different layouts, or strided tensors.
    """

    def __init__(self, documents: Sequence[DocumentLayer], budgets: Sequence[int]) -> None:
        first = documents[0]
        self._layout, device = first.layout, first.states.device
        self.key_widths, self.value_widths = (
            rows.layout.arguments for rows in (first.key_rows, first.value_rows)
        )
        self.key_stride, self.value_stride = first.key_bases.stride(0), first.value_bases.stride(1)
        self.dtype = first.key_bases.dtype
        self.kv_heads, _, self.value_dim = first.value_bases.shape
        self.dim = first.key_bases.shape[1] // self.kv_heads
        self.index_layout = first.index_layout
        self.key_scaled, self.value_scaled = first.key_scales is not None, first.value_scales is not None
        self.value_rank = max(one.value_rows.layout.rank for one in documents)
        self.documents: tuple[DocumentLayer, ...] = ()
        places, sizes = self._read(documents, budgets)
        self._addresses, self._sizes = upload(places, device), upload(sizes, device)
        count, width = len(documents), places.shape[1]
        rows = self._addresses[:, :count]
        self.index = rows[:-7]
        (
            self.states, self.key_rows, self.value_rows, self.key_bases, self.value_bases, self.key_scales,
            self.value_scales,
        ) = rows[-7:]  # fmt: skip
        self.lengths, self.budgets = self._sizes[:count], self._sizes[width : width + count]
        self.key_shapes = self._sizes[2 * width :].view(count, SHAPE.value)
        self.value_shapes = self.key_shapes[:, 4:]

    def overwrite(
        self, documents: Sequence[DocumentLayer], budgets: Sequence[int], lengths: Sequence[int] | None = None
    ) -> None:
        """Decode from other documents of the same layout, as many, from now on; their ranks may be others.

        Args:
            lengths: tokens of each to decode from, its first ones; by default all.
        """
        places, sizes = self._read(documents, budgets, lengths)
        self._addresses.copy_(places, non_blocking=True)
        self._sizes.copy_(sizes, non_blocking=True)

    def forget(self) -> None:
        """Keep no document alive any more: it must not be read before it is overwritten."""
        self.documents = ()

    def _read(
        self, documents: Sequence[DocumentLayer], budgets: Sequence[int], lengths: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if any(one.layout != self._layout for one in {id(one): one for one in documents}.values()):
            raise ValueError("documents of one launch have the same bits, heads, dtype and kind of index")
        self.documents = tuple(documents)
        places = table([one.addresses for one in documents], torch.int64)
        sizes = zip(lengths or [one.tokens for one in documents], budgets, strict=True)
        shapes = numbers([one.shape for one in documents], torch.int32)
        return places, torch.cat(
            (table([list(one) for one in sizes], torch.int32).flatten(), shapes.flatten())
        )


def _contiguous(index: Scorer | None) -> KeySketch | Landmarks:
    """What a scorer reads, for kernels."""
    if isinstance(index, LandmarkScorer):
        return Landmarks(index.landmarks.means.contiguous(), index.unit)
    if not isinstance(index, SketchScorer):
        raise ValueError("tokens are chosen neither by a key sketch nor by landmarks")
    sketch = index.sketch
    return KeySketch(sketch.planes.contiguous(), sketch.codes.contiguous(), sketch.scales.contiguous())


def read_by_scores(index: KeySketch | Landmarks) -> tuple[torch.Tensor, ...]:
    """In the order of `DocumentTable.index`."""
    return (index.means,) if isinstance(index, Landmarks) else (index.codes, index.scales, index.planes)


def _rowwise(bases: torch.Tensor) -> torch.Tensor:
    """Bases whose rows are contiguous: those of a prefix that was just compressed may be columns."""
    return bases if bases.stride(-1) == 1 else bases.contiguous()
