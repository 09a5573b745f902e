"""A prefix's header, held against itself before any shape is computed from it."""

from __future__ import annotations

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import GroupLayout, PrefixManifest
from xkv_service.errors import InvalidSpec
from xkv_service.packed_factors import rank_of
from xkv_service.selection.reuse import following, refuse_reuse
from xkv_service.spec import COLUMN_BITS, CompressionSpec
from xkv_service.stored import RANK_BLOCK


def checked_spec(manifest: PrefixManifest, tensors: int) -> CompressionSpec:
    """The spec in a header whose groups fit it, so that shapes can be computed from both.

    Args:
        tensors: how many the file has, which bounds the ranks.

    Raises:
        CorruptArtifact: no spec, or layers, widths, ranks or columns that do not belong together.
    """
    try:
        spec = CompressionSpec.from_canonical(manifest.spec)
    except (InvalidSpec, TypeError) as error:
        raise CorruptArtifact(f"the compression spec in the header is not valid: {error}") from None
    _check_layout(manifest, spec, tensors)
    return spec


def _check_layout(manifest: PrefixManifest, spec: CompressionSpec, tensors: int) -> None:
    """Heads, widths and ranks that belong together."""
    for number, group in enumerate(manifest.groups):
        lists = [group.kv_heads, group.key_widths, group.value_widths, group.rotary]
        lists += [group.rope_widths] * group.latent
        if not group.layers or any(len(one) != len(group.layers) for one in lists):
            raise CorruptArtifact(f"group {number} in the header does not describe each of its layers")
        _check_widths(number, group)
        _check_columns(number, group, spec)
        if max(group.rank_k, group.rank_v) > tensors * RANK_BLOCK:
            raise CorruptArtifact(
                f"group {number} in the header has more ranks than the file has tensors for"
            )
    layers = [layer for group in manifest.groups for layer in group.layers]
    _check_reuse(layers, manifest.groups, spec)
    layers += [window.layer for window in manifest.windows]
    layers += [state.layer for state in manifest.states]
    if not manifest.groups or len(set(layers)) != len(layers) or min(layers) < 0:
        raise CorruptArtifact("the header names a layer twice, or none")


def _check_reuse(layers: list[int], groups: tuple[GroupLayout, ...], spec: CompressionSpec) -> None:
    heads = [() if group.latent else (heads,) for group in groups for heads in group.kv_heads]
    try:
        refuse_reuse(spec.reuse, following(layers, heads))
    except InvalidSpec as error:
        raise CorruptArtifact(f"the compression spec in the header: {error.message}") from None


def _check_columns(number: int, group: GroupLayout, spec: CompressionSpec) -> None:
    """With a calibration, columns of the bits that the spec allows, most first, as many as the ranks."""
    allowed = COLUMN_BITS[spec.factor_dtype] if spec.calibration is not None else ()
    for rank, columns in ((group.rank_k, group.columns_k), (group.rank_v, group.columns_v)):
        bits = [bits for bits, _ in columns]
        known = set(bits) <= set(allowed) and bits == sorted(set(bits), reverse=True)
        if not known or rank_of(columns) != (rank if allowed else 0):
            raise CorruptArtifact(f"group {number} in the header: its columns do not fit spec and ranks")


def _check_widths(number: int, group: GroupLayout) -> None:
    if group.latent:
        plain = set(group.kv_heads) == {1} and set(group.value_widths) == {0} and group.rank_v == 0
        if not plain or min(*group.key_widths, *group.rope_widths) < 1:
            raise CorruptArtifact(
                f"group {number} in the header: its widths are not those of latent attention"
            )
        return
    for heads, key, value in zip(group.kv_heads, group.key_widths, group.value_widths, strict=True):
        if heads < 1 or key < 1 or value < 1 or key % heads or value % heads:
            raise CorruptArtifact(
                f"group {number} in the header: {heads} heads do not divide {key} and {value}"
            )
    if group.rank_v < 1:
        raise CorruptArtifact(f"group {number} in the header has no rank for its values")
