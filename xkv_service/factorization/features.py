"""`Features`: the keys or the values of one group of layers, side by side, read from a prefill in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from xkv_artifacts.manifest import GroupLayout
from xkv_service.calibration.calibration import KINDS, Kind
from xkv_service.factorization.gram import fill_rows, product_dtype
from xkv_service.factorization.subspace import precise_products
from xkv_service.packed_factors import Runs
from xkv_service.prefilling.prefilled import Prefill

CHUNK_TOKENS_CPU = 2048
CHUNK_TOKENS_CUDA = 32768


@dataclass(frozen=True)
class Features:
    """X [T, W] = [X_l | X_(l+1) | ...] of a group: keys before RoPE, or values."""

    exact: Prefill
    layout: GroupLayout
    kind: Kind

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each layer."""
        return self.layout.key_widths if self.kind == "key" else self.layout.value_widths

    @property
    def rank(self) -> int:
        """r, columns of the token factors to be made."""
        return self.layout.rank_k if self.kind == "key" else self.layout.rank_v

    @property
    def runs(self) -> Runs:
        """Bits of these columns, or () where all are alike."""
        return self.layout.columns_k if self.kind == "key" else self.layout.columns_v

    @property
    def chunk_tokens(self) -> int:
        """Rows to have in memory at once."""
        return CHUNK_TOKENS_CPU if self.exact.device.type == "cpu" else CHUNK_TOKENS_CUDA

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype rows are multiplied in for a Gram matrix."""
        read = self.exact.rotated_keys if self.kind == "key" else self.exact.values
        return product_dtype(read(self.layout.layers[0], 0, 1).dtype, self.exact.device)

    @property
    def read_dtype(self) -> torch.dtype:
        """Features need no more than float32 before they are multiplied."""
        return min(self.product_dtype, torch.float32, key=lambda dtype: dtype.itemsize)

    def read(self, position: int, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1 of the group's layer number `position`: [t, kv_heads, D]."""
        layer = self.layout.layers[position]
        if self.kind == "key":
            return self.exact.keys(layer, start, stop, dtype=self.read_dtype)
        return self.exact.values(layer, start, stop)

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows [t, W]); the rows are overwritten by the next chunk's."""
        tokens, step = self.exact.tokens, self.chunk_tokens
        shape = min(step, tokens), sum(self.widths)
        buffer = torch.empty(shape, dtype=self.read_dtype, device=self.exact.device)
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            yield start, stop, fill_rows(buffer, self.read, self.widths, start, stop)

    def project(self, projection: torch.Tensor) -> torch.Tensor:
        """X P, float32 [T, r], of a projection [W, r]."""
        right = projection.to(self.read_dtype)
        shape = self.exact.tokens, projection.shape[1]
        factors = torch.empty(shape, dtype=torch.float32, device=self.exact.device)
        with precise_products():
            for start, stop, rows in self.chunks():
                factors[start:stop] = wide_product(rows, right)
        return factors


def features_of(exact: Prefill, layout: GroupLayout) -> list[Features]:
    """Keys and values of a group; latents (MLA) are keys without values."""
    return [Features(exact, layout, kind) for kind in (KINDS[:1] if layout.latent else KINDS)]


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, summed and returned in float32 where the inputs have 16 bits."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype.itemsize == 2 else left @ right
