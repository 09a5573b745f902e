"""Part of an artifact: the leading columns of its token factors, in whole blocks as they are stored.

Columns stand in order of what they are worth, so the first ones are the best approximation of their rank.
How good that is depends on the document: precompute may measure it (`compression.with_parts`).
"""

from __future__ import annotations

from dataclasses import replace

from xkv_artifacts.manifest import GroupLayout, PrefixManifest
from xkv_service.factors import GroupFactors, LowRank, PrefixFactors
from xkv_service.packed_factors import Runs, column_blocks, leading_columns, leading_runs, rank_of
from xkv_service.spec import CompressionSpec
from xkv_service.stored import RANK_BLOCK, runs_of, stored_tensors

SHARES = (0.5, 0.75)
"""Parts that are measured: less loses answers, and more saves next to nothing (docs/serving.md)."""


def leading_rank(runs: Runs, share: float) -> int:
    """Columns of the fewest leading blocks that hold at least `share` of all columns."""
    wanted = share * rank_of(runs)
    return next((stop for _, stop, _ in column_blocks(runs, RANK_BLOCK) if stop >= wanted), rank_of(runs))


def part_layout(group: GroupLayout, spec: CompressionSpec, share: float) -> GroupLayout:
    """The group with the columns of a part."""
    key = leading_rank(runs_of(spec, group.rank_k, group.columns_k), share)
    value = leading_rank(runs_of(spec, group.rank_v, group.columns_v), share)
    columns = {
        "columns_k": leading_runs(group.columns_k, key),
        "columns_v": leading_runs(group.columns_v, value),
    }
    return group.model_copy(update={"rank_k": key, "rank_v": value, **columns})


def part_manifest(manifest: PrefixManifest, spec: CompressionSpec, share: float) -> PrefixManifest:
    """The manifest with the columns of a part, and the tensors that hold them; `scales` are still whole."""
    groups = tuple(part_layout(group, spec, share) for group in manifest.groups)
    wanted = stored_tensors(spec, manifest.tokens, groups)
    tensors = {
        name: digest
        for name, digest in manifest.tensors.items()
        if name in wanted or not name.startswith("group.")
    }
    return manifest.model_copy(update={"groups": groups, "tensors": tensors})


def leading_part(factors: PrefixFactors, share: float) -> PrefixFactors:
    """The factors with the columns of a part: views."""
    return replace(factors, groups=tuple(_part(group, factors.spec, share) for group in factors.groups))


def _part(group: GroupFactors, spec: CompressionSpec, share: float) -> GroupFactors:
    layout = part_layout(group.layout, spec, share)
    values = None if group.values is None else _leading(group.values, layout.rank_v)
    return GroupFactors(layout, _leading(group.keys, layout.rank_k), values)


def _leading(pair: LowRank, rank: int) -> LowRank:
    return replace(
        pair,
        factors=leading_columns(pair.factors, rank),
        directions=pair.directions[:rank],
        scales=None if pair.scales is None else pair.scales[:rank],
    )
