"""A latent-attention (MLA) layer's share of a compressed prefix.

The layer caches a latent c = A_t B and one rotated key for all heads; its own `expand_kv` makes each head's
key and value of them. That map is linear: a head's values are A_t (B W_v), so the token factors of the
latents serve as value factors too, and a score is (q W_k)·c + q_rope·k_rope. Latents do not turn, so the
leading columns of A are a selection index that costs nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from xkv_service.decoding.layer_prefix import half, keep_first
from xkv_service.decoding.scoring import Scorer
from xkv_service.errors import UnsupportedModel
from xkv_service.factors import PrefixFactors
from xkv_service.packed_factors import PackedFactors, leading_columns
from xkv_service.stored import RANK_BLOCK

INDEX_RANK = RANK_BLOCK
"""Leading columns of the token factors that score tokens: the first block as stored."""


class Expansion:
    """An attention module's `expand_kv`, for rows of tokens.

    Args:
        module: the attention module. inner: the dtype it computes in. dtype: of what comes out.
    """

    def __init__(self, module: nn.Module, inner: torch.dtype, dtype: torch.dtype) -> None:
        self._module: Any = module
        self._inner, self.dtype = inner, dtype

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, k, D] and values [heads, k, Dv] of latents [k, rank], rotated keys [k, rope_dim]."""
        rows = latents.to(self._inner)[None, None], rope_keys.to(self._inner)[None, None]
        keys, values = self._module.expand_kv(*rows)
        return keys[0].to(self.dtype), values[0].to(self.dtype)

    def maps(
        self, rank: int, rope_dim: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """To each head's key and value from a latent, and to its key from a rotated key.

        Returns:
            [heads, rank, D], [heads, rank, Dv], [heads, rope_dim, D].

        Raises:
            UnsupportedModel: keys or values are not linear in these.
        """
        size = rank + rope_dim + 1
        units = torch.eye(rank + rope_dim, size, device=device).t()
        keys, values = self(units[:, :rank], units[:, rank:])
        if bool(keys[:, -1].any()) or bool(values[:, -1].any()):
            raise UnsupportedModel(f"{type(self._module).__name__} adds a bias to what its latents expand to")
        return keys[:, :rank], values[:, :rank], keys[:, rank:-1]


class LatentPrefix:
    """One latent layer of a prefix of p tokens, as `ReadablePrefix`; every query head is a KV head.

    Args:
        factors: the prefix, all of it. layer: a latent layer. expansion: what its latents expand to.
        device: where attention runs. positions: as `ReadablePrefix`.
    """

    def __init__(
        self,
        factors: PrefixFactors,
        layer: int,
        expansion: Expansion,
        device: torch.device,
        positions: torch.Tensor,
    ) -> None:
        group, place = factors.locate(layer)
        self.layer, self.tokens, self.dtype, self._expand = layer, factors.tokens, expansion.dtype, expansion
        self.positions = positions
        self._factors, bases, scales = half(group.keys, place, device, self.dtype)
        self._bases = bases if scales is None else bases * scales[:, None]
        self._rope_keys = factors.rope_keys[layer].to(device, self.dtype)
        key_maps, value_maps, rope_maps = expansion.maps(
            self._bases.shape[1], self._rope_keys.shape[1], device
        )
        self.value_bases = self._bases @ value_maps
        self._keep_exact(factors, device)
        leading = self._bases[:INDEX_RANK] @ key_maps
        self.index: Scorer | None = LatentScorer(self._factors, self._rope_keys, leading, rope_maps)

    def _keep_exact(self, factors: PrefixFactors, device: torch.device) -> None:
        where = torch.empty(0, dtype=torch.int64, device=device)
        latents = torch.empty(0, self._bases.shape[1], dtype=self.dtype, device=device)
        if self.layer in factors.exact:
            exact = factors.exact[self.layer]
            where = exact.positions.to(device, torch.int64)
            latents = exact.keys[:, 0].to(device, self.dtype)
        keys, values = self._expand(latents, self._rope_keys[where])
        self.exact_positions = where
        self.exact_keys, self.exact_values = keys.transpose(0, 1), values.transpose(0, 1)

    def first(self, tokens: int) -> LatentPrefix:
        """The layer's share of the first tokens: views, so it costs no memory."""
        other = copy.copy(self)
        other._factors, other._rope_keys = self._factors[:tokens], self._rope_keys[:tokens]
        assert isinstance(self.index, LatentScorer)
        other.index = self.index.first(tokens)
        keep_first(other, tokens)
        return other

    def keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Keys [k, heads, D] of positions int64 [k], expanded from rebuilt latents and exact rotated keys."""
        latents = self._factors[positions].to(self.dtype) @ self._bases
        return self._expand(latents, self._rope_keys[positions])[0].transpose(0, 1)

    def expanded(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> torch.Tensor:
        """Keys [k, heads, D] of exact latents [k, rank] and rotated keys [k, rope_dim]."""
        return self._expand(latents, rope_keys)[0].transpose(0, 1)

    def value_factors(self, positions: torch.Tensor) -> torch.Tensor:
        """A[positions], [k, r]: `value_bases` lead from the latents' factors to each head's values."""
        return self._factors[positions].to(self.dtype)


class LatentScorer:
    """Scores tokens by the leading columns of the latents' token factors and the exact rotated keys.

    Args:
        factors: A [T, r]; packed columns are unpacked when they score. rope_keys: [T, rope_dim].
        key_maps: [heads, n, D], from n leading columns of A to each head's key.
        rope_maps: [heads, rope_dim, D], from a rotated key to each head's key.
    """

    unit = 1

    def __init__(
        self,
        factors: torch.Tensor | PackedFactors,
        rope_keys: torch.Tensor,
        key_maps: torch.Tensor,
        rope_maps: torch.Tensor,
    ) -> None:
        self._leading, self._rope_keys = leading_columns(factors, key_maps.shape[1]), rope_keys
        self._maps = torch.cat([key_maps, rope_maps], dim=1).mT.float()

    def first(self, tokens: int) -> LatentScorer:
        """The same of the first tokens: views."""
        other = copy.copy(self)
        other._leading, other._rope_keys = self._leading[:tokens], self._rope_keys[:tokens]
        return other

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        absorbed = queries.float() @ self._maps
        count = self._leading.shape[1]
        scores = absorbed[..., :count] @ self._leading[:].float().t()
        return scores.add_(absorbed[..., count:] @ self._rope_keys.float().t())
