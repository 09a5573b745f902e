"""Compress a prefix: prefill, grouped truncated SVD, selection index, exact tokens, fidelity.

from xkv_service import CompressionSpec, compress

factors = compress(model, input_ids, CompressionSpec(ratio=8))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from xkv_artifacts.manifest import PartFidelity
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.limits import fidelity_limit
from xkv_service.errors import RatioUnreachable
from xkv_service.factorization.group_factors import factorize_groups
from xkv_service.factorization.projected_factors import project_groups
from xkv_service.factorization.ranks import RotaryUse, size_of
from xkv_service.factors import LayerWindow, PrefixFactors
from xkv_service.fidelity import certify, held_back
from xkv_service.leading_part import SHARES, leading_part
from xkv_service.modeling.rotary import RotaryTable
from xkv_service.prefilling.prefill import TokenIds, prefill
from xkv_service.prefilling.prefill_run import id_vector
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.layer_index import index_layers
from xkv_service.spec import CompressionSpec
from xkv_service.stored import DTYPES


def compress(
    model: PreTrainedModel,
    input_ids: TokenIds,
    spec: CompressionSpec | None = None,
    calibration: Calibration | None = None,
) -> PrefixFactors:
    """Compress the KV cache of one prefix.

    Args:
        model: a supported Transformers model, on any device.
        input_ids: token ids of the prefix, a list or integer tensor [T] or [1, T].
        spec: how to compress; by default 8x, everything counted.
        calibration: the one that the spec names, if it names one.

    Returns:
        Factors on the model's device, with their fidelity.

    Raises:
        UnsupportedModel: the model's cache cannot be compressed.
        InvalidPrompt: no tokens, or ids that are not one text's or not the model's, or too many.
        RatioUnreachable, InvalidSpec: the spec does not fit this model and length.
    """
    ids = id_vector(input_ids)
    exact = prefill(model, ids, tail=held_back(ids.numel()))
    try:
        return compress_prefill(model, exact, spec or CompressionSpec(), calibration)
    finally:
        exact.free()


def compress_prefill(
    model: PreTrainedModel,
    exact: Prefill,
    spec: CompressionSpec,
    calibration: Calibration | None = None,
    *,
    parts: bool = False,
) -> PrefixFactors:
    """Compress a prefill made with `tail=held_back(T)`. Measuring fidelity uses the prefill up.

    Args:
        parts: measure parts of the factors too, see `leading_part`: as long again for each as for the whole.

    Raises:
        RatioUnreachable, InvalidSpec: the spec does not fit this model and length.
    """
    factors, errors = factorize_prefill(model, exact, spec, calibration)
    return _certified(model, exact, factors, errors, calibration, parts=parts)


def compress_each(
    model: PreTrainedModel,
    input_ids: TokenIds,
    specs: Sequence[CompressionSpec],
    calibration: Calibration | None = None,
    *,
    parts: bool = False,
) -> list[PrefixFactors]:
    """`compress` with each spec whose ratio can be reached, by one prefill.

    All are factored before the first is measured, which uses up the exact cache; what the exact cache
    predicts is known from the prefill.

    Args:
        parts: as `compress_prefill`.

    Raises:
        UnsupportedModel, InvalidPrompt, InvalidSpec: as `compress`.
    """
    ids = id_vector(input_ids)
    exact = prefill(model, ids, tail=held_back(ids.numel()))
    try:
        made = []
        for spec in specs:
            with suppress(RatioUnreachable):
                made.append(factorize_prefill(model, exact, spec, calibration))
        return [
            _certified(model, exact, factors, errors, calibration, parts=parts) for factors, errors in made
        ]
    finally:
        exact.free()


@dataclass(frozen=True)
class ReconstructionErrors:
    """Relative Frobenius error of each group's keys and values, before exact tokens.

    Over a calibration's bases it counts the rounding of the factors, else it comes before that.
    In a group of latent attention that of the latents, and 0: what is cached beside them is exact.
    """

    key_error: tuple[float, ...]
    value_error: tuple[float, ...]


def factorize_prefill(
    model: PreTrainedModel, exact: Prefill, spec: CompressionSpec, calibration: Calibration | None = None
) -> tuple[PrefixFactors, ReconstructionErrors]:
    """Factors of a prefill without fidelity. The prefill is left as it was and can serve other specs."""
    tables, use = rotary_tables(exact)
    size = size_of(exact.layout, exact.tokens, spec, use, calibration)
    with torch.no_grad():
        if calibration is not None and spec.basis == "calibrated":
            made = project_groups(exact, spec, size.groups, calibration)
        else:
            made = factorize_groups(model, exact, spec, size.groups, calibration)
        index = index_layers(exact, spec, made.key_energy, calibration)
        windows = _windows(exact, spec)
        rope_keys = _rope_keys(exact, spec)
    factors = PrefixFactors(
        spec=spec,
        bytes_full=size.bytes_full,
        token_ids=exact.token_ids.to("cpu", torch.int32),
        groups=made.groups,
        rotary=tables,
        sketches=index.sketches,
        landmarks=index.landmarks,
        planes=index.planes,
        exact=index.exact,
        rope_keys=rope_keys,
        windows=windows,
        states={state.layer: exact.state(state.layer) for state in exact.layout.states},
    )
    return factors, ReconstructionErrors(made.key_error, made.value_error)


def _certified(
    model: PreTrainedModel,
    exact: Prefill,
    factors: PrefixFactors,
    errors: ReconstructionErrors,
    calibration: Calibration | None,
    *,
    parts: bool,
) -> PrefixFactors:
    """The factors with their fidelity, and the limit that their calibration sets it."""
    fidelity = certify(model, exact, factors, errors.key_error, errors.value_error)
    if parts and fidelity.positions:
        fidelity = fidelity.model_copy(update={"parts": tuple(_parts(model, exact, factors))})
    if calibration is not None:
        limit = fidelity_limit(factors.spec.ratio, calibration.figures)
        fidelity = fidelity.model_copy(update={"kl_limit": limit})
    return factors.with_fidelity(fidelity)


def _parts(model: PreTrainedModel, exact: Prefill, factors: PrefixFactors) -> Iterator[PartFidelity]:
    """What is left of the fidelity in each part that leaves columns out, and other ones than the last."""
    known = [_ranks(factors)]
    for share in SHARES:
        part = leading_part(factors, share)
        if _ranks(part) in known:
            continue
        known.append(_ranks(part))
        found = certify(model, exact, part, (), ())
        if math.isfinite(found.kl):
            yield PartFidelity(share=share, top1_agreement=found.top1_agreement, kl=found.kl)


def _ranks(factors: PrefixFactors) -> list[tuple[int, int]]:
    return [(group.layout.rank_k, group.layout.rank_v) for group in factors.groups]


def rotary_tables(exact: Prefill) -> tuple[tuple[RotaryTable, ...], RotaryUse]:
    """The distinct rotary tables of a prefill's layers, and which layer uses which."""
    tables: list[RotaryTable] = []
    table_of: dict[int, int] = {}
    for layer in exact.layout.compressible:
        table = exact.rotary(layer.index)
        same = [number for number, known in enumerate(tables) if _equal(known, table)]
        table_of[layer.index] = same[0] if same else len(tables)
        if not same:
            tables.append(table)
    tensors = [tensor for table in tables for tensor in table.to_tensors().values()]
    return tuple(tables), RotaryUse(table_of, sum(tensor.nbytes for tensor in tensors), len(tensors))


def _equal(left: RotaryTable, right: RotaryTable) -> bool:
    if (left.scaling, left.rounding) != (right.scaling, right.rounding):
        return False
    pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]] = (
        (left.planes, right.planes),
        (left.inv_freq, right.inv_freq),
        (left.cos, right.cos),
        (left.sin, right.sin),
    )
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _windows(exact: Prefill, spec: CompressionSpec) -> dict[int, LayerWindow]:
    dtype = DTYPES[spec.dtype]
    windows = {}
    for layer in exact.layout.layers:
        if layer.kind == "sliding":
            keys, values = exact.window(layer.index)
            windows[layer.index] = LayerWindow(keys.to(dtype, copy=True), values.to(dtype, copy=True))
    return windows


def _rope_keys(exact: Prefill, spec: CompressionSpec) -> dict[int, torch.Tensor]:
    """By latent layer, the rotated keys [T, rope_dim] as cached."""
    dtype = DTYPES[spec.dtype]
    return {
        layer.index: exact.values(layer.index)[:, 0].to(dtype, copy=True)
        for layer in exact.layout.compressible
        if layer.kind == "latent"
    }
