"""Bytes that a bound prefix will hold, from its manifest alone: what is reserved before it is loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from xkv_artifacts.manifest import GroupLayout, PrefixManifest
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.decoding.kernel_choice import kernels_run
from xkv_service.decoding.latent import INDEX_RANK, Expansion
from xkv_service.decoding.prefix import product_dtype
from xkv_service.engine.storages import held_bytes
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.packed_factors import packed_width
from xkv_service.selection.exact import exact_count
from xkv_service.spec import CompressionSpec
from xkv_service.stored import StoredTensor, runs_of, sketch_planes, stored_tensors

_SMALL = 4096
"""A layer's planes and the like."""


def calibration_bytes(model: PreTrainedModel, calibration: Calibration) -> int:
    """Bytes on the model's device of a calibration that prefixes decode from: all of it on a CPU, elsewhere
    its bases as they are placed there.
    """
    if model.device.type == "cpu":
        return held_bytes(calibration, device=model.device)
    bases = [group.basis(kind).bases for group in calibration.groups for kind in KINDS]
    return sum(one.numel() * int(product_dtype(model).itemsize) for one in bases)


def prefix_bytes(model: PreTrainedModel, manifest: PrefixManifest, spec: CompressionSpec) -> int:
    """At most so many bytes the whole prefix holds on the model's device, and hardly fewer; a calibration's
    bases, which it shares with others, left out.

    Token factors and a stored index stay as they are stored; bases and exact tokens are in the dtype of
    matrix products; cos and sin of every position, the positions themselves, and a derived index come on top.
    """
    table = stored_tensors(spec, manifest.tokens, manifest.groups, manifest.windows, manifest.states)
    total: int = sum(_held(name, tensor, model) for name, tensor in table.items())
    total += sum(_group_bytes(group, manifest.tokens, spec, model) for group in manifest.groups)
    layers = sum(len(group.layers) for group in manifest.groups)
    apart = layers if spec.outlier_chunks else 1
    if kernels_run(model.device):  # which tokens may be chosen, and rows that begin at multiples of 16 bytes
        total += manifest.tokens * (layers + sum(_row_padding(group, spec) for group in manifest.groups))
    return total + 8 * manifest.tokens * apart + _turns(manifest) + _SMALL * layers


def _held(name: str, tensor: StoredTensor, model: PreTrainedModel) -> int:
    """What becomes of one stored tensor; bases, and what latents expand to, are counted by the group."""
    numbers = tensor.nbytes // tensor.dtype.itemsize
    kind = name.split(".", 2)[-1]
    if kind == "exact.positions":
        return 8 * numbers
    if kind in ("exact.keys", "exact.values", "rope_key"):
        return numbers * product_dtype(model).itemsize
    if kind.startswith("window"):
        return numbers * int(model.dtype.itemsize)
    if name == "tokens":
        return 8 * numbers if model.device.type == "cpu" else 0
    if kind.startswith("state"):
        return tensor.nbytes if model.device.type == "cpu" else 0
    of_bases = name.startswith("group") and ("bases" in kind or "scales" in kind)
    return 0 if of_bases else tensor.nbytes


def _group_bytes(group: GroupLayout, tokens: int, spec: CompressionSpec, model: PreTrainedModel) -> int:
    size = product_dtype(model).itemsize
    bases = group.rank_k * sum(group.key_widths) + group.rank_v * sum(group.value_widths)
    if spec.basis == "calibrated":
        bases = len(group.layers) * (group.rank_k + group.rank_v)  # scales
    if group.latent:
        own = sum(_expanded(group, place, tokens, spec, model) for place in range(len(group.layers)))
        return size * bases + own
    derived = 0
    if spec.index == "derived":
        for layer, heads, width in zip(group.layers, group.kv_heads, group.key_widths, strict=True):
            if layer not in spec.reuse:
                derived += tokens * heads * (sketch_planes(spec, width // heads) + torch.float16.itemsize)
    return size * bases + derived


def _row_padding(group: GroupLayout, spec: CompressionSpec) -> int:
    """Bytes that the kernels' rows of token factors add to a token's (`FactorRows`)."""
    runs = (*runs_of(spec, group.rank_k, group.columns_k), *runs_of(spec, group.rank_v, group.columns_v))
    return sum(-packed_width(bits, count) % 16 for bits, count in runs)


def _expanded(
    group: GroupLayout, place: int, tokens: int, spec: CompressionSpec, model: PreTrainedModel
) -> int:
    """What a latent layer makes of its bases and exact latents: per head, as its module expands them."""
    module, size = inspect_loaded(model).modules[group.layers[place]], product_dtype(model).itemsize
    width, rope = group.key_widths[place], group.rope_widths[place]
    row = torch.zeros(1, width + rope, device=model.device)
    keys, values = Expansion(module, model.dtype, product_dtype(model))(row[:, :width], row[:, width:])
    heads, _, dim = keys.shape
    value_bases = group.rank_k * heads * values.shape[2]
    # A view of values keeps the keys alive that were made with them.
    exact = exact_count(tokens, spec) * heads * (2 * dim + values.shape[2])
    maps = heads * dim * (min(INDEX_RANK, group.rank_k) + rope)
    return size * (value_bases + exact) + torch.float32.itemsize * maps


def _turns(manifest: PrefixManifest) -> int:
    """cos and sin of all positions, and recorded tables beside them; as float32, which they may be."""
    widest: dict[int, int] = {}
    for group in manifest.groups:
        for table, width, heads in zip(group.rotary, group.key_widths, group.kv_heads, strict=True):
            planes = 0 if group.latent else width // heads // 2
            widest[table] = max(widest.get(table, 0), planes)
    recorded = {table for table in widest if f"rotary.{table}.cos" in manifest.tensors}
    return sum(
        2 * torch.float32.itemsize * manifest.tokens * planes * (1 + (table in recorded))
        for table, planes in widest.items()
    )
