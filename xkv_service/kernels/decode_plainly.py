"""What the decode kernels compute, in plain PyTorch and float32: their references, one stage each.

All of one layer. Documents are `DocumentLayer`s; queries are [sessions, query_heads, D], rotated, the
sessions of one document one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.kernels.document_table import ALWAYS, CHOOSABLE, DocumentLayer
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.kernels.share_bins import share_bins
from xkv_service.packed_factors import unpack
from xkv_service.selection.sketch import scores


def tail_attention_plainly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [sessions, query_heads, Dv] over a tail, and the log-sum [sessions, query_heads]."""
    sessions, heads, capacity, _ = keys.shape
    grouped = query.float().reshape(sessions, heads, -1, query.shape[2])
    found = grouped @ keys.float().transpose(2, 3) * scaling
    there = torch.arange(capacity, device=keys.device) < lengths[:, None]
    found = found.masked_fill(~there[:, None, None], -3e38)
    out = found.softmax(-1) * there[:, None, None] @ values.float()
    return out.flatten(1, 2), found.logsumexp(-1).flatten(1)


def index_shares_plainly(
    query: torch.Tensor, others: torch.Tensor, document: DocumentLayer, scaling: float
) -> torch.Tensor:
    """The logarithm of the largest share any head would give each token: float32 [sessions, T].

    Args:
        query: of the document's sessions. others: [sessions, query_heads], log-sums of what they see besides.
    """
    found = scores(query, document.sketch) * scaling
    total = torch.logaddexp(found.logsumexp(-1), others)
    return (found - total[..., None]).amax(1)


def choose_plainly(
    shares: torch.Tensor, states: torch.Tensor, budget: int, bins: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen tokens of one document's sessions.

    Args:
        shares: [sessions, T]. states: uint8 [T].

    Returns:
        int32 [u], ascending positions, and int32 [u], bit i: session i chose it.
    """
    levels, member = share_bins(shares, bins), torch.zeros_like(states, dtype=torch.int32)
    for number, level in enumerate(levels):
        candidates = (states == CHOOSABLE).nonzero()[:, 0]
        best = level[candidates].sort(descending=True, stable=True).indices[:budget]
        member[candidates[best]] |= _bit(number)
    member[states == ALWAYS] = -1
    positions = member.nonzero()[:, 0]
    return positions.int(), member[positions]


def _bit(number: int) -> int:
    """1 << number as a signed number of 32 bits."""
    return (1 << number) - (1 << 32) * (number == 31)


def factors_of(rows: FactorRows, positions: torch.Tensor) -> torch.Tensor:
    """A[positions], float32 [k, r], read from aligned rows."""
    layout, data = rows.layout, rows.data[positions.long()]
    size = layout.whole.itemsize * layout.whole_columns
    parts = [data[:, :size].contiguous().view(layout.whole).float()]
    for bits, count, offset in (
        (4, layout.four_columns, layout.four_offset),
        (2, layout.two_columns, layout.two_offset),
    ):
        packed = data[:, offset : offset + -(-count * bits // 8)]
        parts.append(unpack(packed, bits, count).float())
    return torch.cat(parts, 1)


def rebuilt_scores_plainly(
    query: torch.Tensor, document: DocumentLayer, positions: torch.Tensor, members: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor], scaling: float, *, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Scores [sessions, query_heads, u] of a document's chosen tokens; -inf where one did not choose."""
    sessions, query_heads, dim = query.shape
    heads = document.sketch.planes.shape[0]
    factors = factors_of(document.key_rows, positions)
    if document.key_scales is not None:
        factors = factors * document.key_scales.float()
    keys = (factors @ document.key_bases.float()).reshape(-1, heads, dim)
    cos, sin = (table[positions.long()].float()[:, None] for table in turns)
    first, second = (
        (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(dim // 2), slice(dim // 2, dim))
    )
    x, y = keys[..., first], keys[..., second]
    turned = torch.empty_like(keys)
    turned[..., first], turned[..., second] = x * cos - y * sin, y * cos + x * sin
    grouped = query.float().reshape(sessions, heads, query_heads // heads, dim)
    found = torch.einsum("shgd,uhd->shgu", grouped, turned) * scaling
    numbers = torch.arange(sessions, device=members.device)[:, None]
    chose = (members[None] >> numbers) & 1
    return found.flatten(1, 2).masked_fill(chose[:, None] == 0, -torch.inf)


def latent_values_plainly(
    scores: torch.Tensor, document: DocumentLayer, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of scores [sessions, query_heads, u] times A_v, [sessions, query_heads, r_v], and log-sums."""
    return scores.softmax(-1) @ factors_of(document.value_rows, positions), scores.logsumexp(-1)


def projected_output_plainly(
    latents: torch.Tensor, log: torch.Tensor, rest: torch.Tensor, rest_log: torch.Tensor,
    document: DocumentLayer,
) -> torch.Tensor:  # fmt: skip
    """A layer's attention [sessions, query_heads, Dv] from latents and from what was attended to besides."""
    heads = document.value_bases.shape[0]
    if document.value_scales is not None:
        latents = latents * document.value_scales.float()
    grouped = latents.reshape(latents.shape[0], heads, -1, latents.shape[2])
    rebuilt = (grouped @ document.value_bases.float()).flatten(1, 2)
    share = torch.sigmoid(log - rest_log)[..., None]
    merged: torch.Tensor = rebuilt * share + rest * (1 - share)
    return merged


def decode_attention_plainly(
    query: torch.Tensor, tail: tuple[torch.Tensor, torch.Tensor], tail_lengths: torch.Tensor,
    documents: Sequence[DocumentLayer], sessions: Sequence[int], budgets: Sequence[int],
    turns: tuple[torch.Tensor, torch.Tensor], scaling: float, *, bins: int = 512, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """All stages: a layer's attention [sessions, query_heads, Dv], float32."""
    rest, rest_log = tail_attention_plainly(query, *tail, tail_lengths, scaling)
    parts, start = [], 0
    for document, count, budget in zip(documents, sessions, budgets, strict=True):
        mine = slice(start, start + count)
        start += count
        shares = index_shares_plainly(query[mine], rest_log[mine], document, scaling)
        chosen = choose_plainly(shares, document.states, budget, bins)
        found = rebuilt_scores_plainly(
            query[mine], document, *chosen, turns, scaling, interleaved=interleaved
        )
        latents, log = latent_values_plainly(found, document, chosen[0])
        parts.append(projected_output_plainly(latents, log, rest[mine], rest_log[mine], document))
    return torch.cat(parts)
