"""What the decode kernels compute, in plain PyTorch and float32: their references, one stage each.

All of one layer. Documents are `DocumentLayer`s; queries are [query_heads, D] of one session, rotated, or
[sessions, query_heads, D] of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.kernels.document_table import ALWAYS, CHOOSABLE, CLOSED, DocumentLayer
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.kernels.share_bins import share_bins
from xkv_service.packed_factors import unpack
from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch, scores


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


def shared_attention_plainly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rest: torch.Tensor,
    rest_log: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention [query_heads, Dv] of one session over a document's keys [kv_heads, T, D] and values, and over
    what it has attended to; and the log-sum of both.
    """
    grouped = query.float().reshape(keys.shape[0], -1, query.shape[1])
    found = grouped @ keys.float().transpose(1, 2) * scaling
    own, log = (found.softmax(-1) @ values.float()).flatten(0, 1), found.logsumexp(-1).flatten()
    share = torch.sigmoid(log - rest_log)[:, None]
    return own * share + rest * (1 - share), torch.logaddexp(log, rest_log)


def parts_plainly(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [parts, kv_heads, m, Dv] of rows [kv_heads, m, D] to each of equal parts of a document's keys
    [kv_heads, T, D] and values; and the logs of sums of exponentials.
    """
    keys, values = (
        one.float().reshape(len(one), parts, -1, one.shape[2]).transpose(0, 1) for one in (keys, values)
    )
    found = rows.float() @ keys.mT * scaling
    return (found.softmax(-1) @ values).to(rows.dtype), found.logsumexp(-1)


def index_shares_plainly(
    query: torch.Tensor, others: torch.Tensor, document: DocumentLayer, scaling: float
) -> torch.Tensor:
    """The logarithm of the largest share any head would give each token, or each landmark's chunk: float32
    [units].

    Args:
        others: [query_heads], log-sums of what the session sees besides.
    """
    found = _index_scores(query, document.index) * scaling
    total = torch.logaddexp(found.logsumexp(-1), others)
    return (found - total[..., None]).amax(0)


def _index_scores(query: torch.Tensor, index: KeySketch | Landmarks) -> torch.Tensor:
    """Products [query_heads, units]."""
    if isinstance(index, KeySketch):
        return scores(query[None], index)[0]
    means = index.means.float()
    grouped = query.float().reshape(means.shape[1], -1, means.shape[2])
    return torch.einsum("hgd,uhd->hgu", grouped, means).flatten(0, 1)


def choose_plainly(
    shares: torch.Tensor, states: torch.Tensor, budget: int, bins: int, unit: int = 1
) -> torch.Tensor:
    """Ascending positions, int32 [u], of a session's tokens.

    Args:
        shares: [units]. states: uint8 [T]. budget: of whole units. unit: tokens that have one share. Of more
            than one the budget pays for whole units, and of those in one bin first for what may be chosen.
    """
    size = len(shares) * unit
    padded = torch.nn.functional.pad(states, (0, size - len(states)), value=CLOSED)
    open_ = padded == CHOOSABLE
    levels = 2 * share_bins(shares, bins).repeat_interleave(unit) + open_
    paid = (open_ if unit == 1 else torch.ones_like(open_)).nonzero()[:, 0]
    best = paid[levels[paid].sort(descending=True, stable=True).indices[:budget]]
    chosen = padded == ALWAYS
    chosen[best] |= open_[best]
    return chosen.nonzero()[:, 0].int()


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
    query: torch.Tensor, document: DocumentLayer, positions: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor], scaling: float, *, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Scores [query_heads, u] of a session's chosen tokens."""
    dim, heads = query.shape[1], document.value_bases.shape[0]
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
    grouped = query.float().reshape(heads, -1, dim)
    return torch.einsum("hgd,uhd->hgu", grouped, turned).flatten(0, 1) * scaling


def latent_values_plainly(
    scores: torch.Tensor, document: DocumentLayer, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of scores [query_heads, u] times A_v, [query_heads, r_v], and log-sums."""
    return scores.softmax(-1) @ factors_of(document.value_rows, positions), scores.logsumexp(-1)


def projected_output_plainly(
    latents: torch.Tensor, log: torch.Tensor, rest: torch.Tensor, rest_log: torch.Tensor,
    document: DocumentLayer,
) -> torch.Tensor:  # fmt: skip
    """A layer's attention [query_heads, Dv] from latents and from what was attended to besides."""
    if document.value_scales is not None:
        latents = latents * document.value_scales.float()
    grouped = latents.reshape(document.value_bases.shape[0], -1, latents.shape[1])
    rebuilt = (grouped @ document.value_bases.float()).flatten(0, 1)
    share = torch.sigmoid(log - rest_log)[..., None]
    merged: torch.Tensor = rebuilt * share + rest * (1 - share)
    return merged


def decode_attention_plainly(
    query: torch.Tensor, tail: tuple[torch.Tensor, torch.Tensor], tail_lengths: torch.Tensor,
    documents: Sequence[DocumentLayer], budgets: Sequence[int], turns: tuple[torch.Tensor, torch.Tensor],
    scaling: float, *, bins: int = 512, interleaved: bool = False,
) -> torch.Tensor:  # fmt: skip
    """All stages: a layer's attention [sessions, query_heads, Dv], float32."""
    rest, rest_log = tail_attention_plainly(query, *tail, tail_lengths, scaling)
    parts = []
    for session, (document, budget) in enumerate(zip(documents, budgets, strict=True)):
        shares = index_shares_plainly(query[session], rest_log[session], document, scaling)
        chosen = choose_plainly(shares, document.states, budget, bins, document.index_layout.unit)
        found = rebuilt_scores_plainly(
            query[session], document, chosen, turns, scaling, interleaved=interleaved
        )
        latents, log = latent_values_plainly(found, document, chosen)
        parts.append(projected_output_plainly(latents, log, rest[session], rest_log[session], document))
    return torch.stack(parts)
