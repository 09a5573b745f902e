"""One layer's documents for a batch of sessions: what kernels find by address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.scoring import Scorer, SketchScorer
from xkv_service.kernels.addresses import addresses
from xkv_service.kernels.factor_rows import FactorRows, RowLayout
from xkv_service.selection.sketch import KeySketch

CLOSED, CHOOSABLE, ALWAYS = 0, 1, 2
"""States of a token: kept exact elsewhere; to be chosen by its share; rebuilt for every query."""


@dataclass(frozen=True)
class DocumentLayer:
    """One layer of one document on the device.

    Args:
        sketch: of T tokens, contiguous. states: uint8 [T], one of the states above.
        key_rows, value_rows: token factors of T tokens, the same tensors for all layers of a group.
        key_bases: [r_k, kv_heads D], rows contiguous. value_bases: [kv_heads, r_v, Dv], the last dimension
            contiguous. Both in the dtype of products.
        key_scales, value_scales: [r_k], [r_v] in that dtype, which the rows of the bases are still to be
            multiplied with, or None.
    """

    sketch: KeySketch
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
            ValueError: its index is no key sketch.
        """
        index = index or layer.index
        if not isinstance(index, SketchScorer):
            raise ValueError(f"layer {layer.layer} has no key sketch to choose tokens by")
        states = torch.zeros(layer.tokens, dtype=torch.uint8, device=layer.positions.device)
        states[layer.positions] = CHOOSABLE
        states[always] = ALWAYS
        sketch = KeySketch(
            *(one.contiguous() for one in (index.planes, index.sketch.codes, index.sketch.scales))
        )
        return cls(
            sketch, states, key_rows, value_rows, _rowwise(layer.key_bases),
            _rowwise(layer.value_bases), layer.key_scales, layer.value_scales,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """T."""
        return self.states.numel()

    @property
    def layout(self) -> tuple[object, ...]:
        """What must be alike in one launch."""
        bases, rows = (self.key_bases, self.value_bases), (self.key_rows.layout, self.value_rows.layout)
        return (
            *rows, *(tuple(base.shape) for base in bases), *(base.stride() for base in bases),
            *(base.dtype for base in bases), self.key_scales is None, self.value_scales is None,
            tuple(self.sketch.planes.shape),
        )  # fmt: skip


class DocumentTable:
    """One layer's documents, one for each session of a batch, which decodes from it.

    The tables are tensors on the device: a captured CUDA graph runs over other documents when they are
    overwritten with another table's (`copy_`).

    Args:
        documents: of one layout, in the order of the sessions. Sessions on one document list it each.
        budgets: tokens to choose for each session.

    Attributes:
        codes, scales, planes, states, key_rows, value_rows, key_bases, value_bases, key_scales, value_scales:
            int64 [sessions], addresses.
        lengths, budgets: int32 [sessions].

    Raises:
        ValueError: documents of different layouts, or strided tensors.
    """

    def __init__(self, documents: Sequence[DocumentLayer], budgets: Sequence[int]) -> None:
        if len({one.layout for one in documents}) != 1:
            raise ValueError("documents of one launch have the same ranks, bits, heads and dtype")
        for one in documents:
            tensors = (one.sketch.codes, one.sketch.scales, one.sketch.planes, one.states)
            bases = (one.key_bases, one.value_bases)
            if not all(t.is_contiguous() for t in tensors) or any(t.stride(-1) != 1 for t in bases):
                raise ValueError("kernels read contiguous indexes, and bases whose rows are contiguous")
        self.documents, first = tuple(documents), documents[0]
        device = first.states.device
        self.codes = addresses([one.sketch.codes for one in documents])
        self.scales = addresses([one.sketch.scales for one in documents])
        self.planes = addresses([one.sketch.planes for one in documents])
        self.states = addresses([one.states for one in documents])
        self.key_rows = addresses([one.key_rows.data for one in documents])
        self.value_rows = addresses([one.value_rows.data for one in documents])
        self.key_bases = addresses([one.key_bases for one in documents])
        self.value_bases = addresses([one.value_bases for one in documents])
        self.key_scaled, self.value_scaled = first.key_scales is not None, first.value_scales is not None
        self.key_scales, self.value_scales = (
            addresses([bases if scales is None else scales for scales, bases in pairs])
            for pairs in (
                [(one.key_scales, one.key_bases) for one in documents],
                [(one.value_scales, one.value_bases) for one in documents],
            )
        )
        self.lengths = torch.tensor([one.tokens for one in documents], dtype=torch.int32).to(device)
        self.budgets = torch.tensor(list(budgets), dtype=torch.int32).to(device)

    @property
    def key_layout(self) -> RowLayout:
        """Of a row of A_k."""
        return self.documents[0].key_rows.layout

    @property
    def value_layout(self) -> RowLayout:
        """Of a row of A_v."""
        return self.documents[0].value_rows.layout

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return self.documents[0].key_bases.dtype

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.documents[0].value_bases.shape[0]

    @property
    def key_base_stride(self) -> int:
        """Numbers from one row of the key bases to the next."""
        return self.documents[0].key_bases.stride(0)

    @property
    def value_head_stride(self) -> int:
        """Numbers from one head of the value bases to the next."""
        return self.documents[0].value_bases.stride(0)

    @property
    def value_row_stride(self) -> int:
        """Numbers from one row of a head's value bases to the next."""
        return self.documents[0].value_bases.stride(1)


def _rowwise(bases: torch.Tensor) -> torch.Tensor:
    """Bases whose rows are contiguous: those of a prefix that was just compressed may be columns."""
    return bases if bases.stride(-1) == 1 else bases.contiguous()
