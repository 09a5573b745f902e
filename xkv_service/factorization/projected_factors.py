"""Token factors over a calibration's bases: one product with X, no factorization of the document's own."""

from __future__ import annotations

import torch

from xkv_artifacts.manifest import GroupLayout
from xkv_service.calibration.calibration import Calibration
from xkv_service.factorization.features import Features, features_of, wide_product
from xkv_service.factorization.group_factors import FactorizedGroups
from xkv_service.factorization.quantize import quantize_runs
from xkv_service.factorization.subspace import precise_products
from xkv_service.factors import GroupFactors, LowRank
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.exact import low_rank_span
from xkv_service.spec import CompressionSpec


def project_groups(
    exact: Prefill, spec: CompressionSpec, layouts: tuple[GroupLayout, ...], calibration: Calibration
) -> FactorizedGroups:
    """Factors of every group's keys and values over the calibration's bases.

    Errors are those of the rounded factors: it costs one more product to know them, and nothing less tells
    whether bases made from other documents suit this one.
    """
    span = slice(*low_rank_span(exact.tokens, spec))
    made = [
        [_project(features, calibration, span) for features in features_of(exact, layout)]
        for layout in layouts
    ]
    keys = [both[0] for both in made]
    values = [both[1] if len(both) > 1 else (None, 0.0) for both in made]
    return FactorizedGroups(
        tuple(
            GroupFactors(*one)
            for one in zip(layouts, [k for k, _ in keys], [v for v, _ in values], strict=True)
        ),
        # Numbers are waited for here, when a device has the work of all groups.
        tuple(float(error) for _, error in keys),
        tuple(float(error) for _, error in values),
        {},
    )


def _project(features: Features, calibration: Calibration, span: slice) -> tuple[LowRank, torch.Tensor]:
    stored = calibration.group_of(features.layout.layers).basis(features.kind)
    basis = stored.on(features.exact.device)
    factors = features.project(basis.projection(features.rank))
    packed, scales = quantize_runs(factors, features.runs, span)
    pair = LowRank(packed, basis.bases[: features.rank], features.widths, scales, stored)
    return pair, _error(features, packed[:], pair.bases, span)


def _error(features: Features, integers: torch.Tensor, bases: torch.Tensor, span: slice) -> torch.Tensor:
    """|X - AB| / |X| over the tokens of `span`, B in the dtype that features are read in: float64 []."""
    right = bases.to(features.read_dtype)
    summed = (
        torch.float64 if bases.device.type == "cpu" else torch.float32
    )  # in a tree there, one by one here
    lost = torch.zeros((), dtype=torch.float64, device=bases.device)
    total = torch.zeros_like(lost)
    with precise_products():
        for start, stop, rows in features.chunks():
            counted = slice(max(span.start - start, 0), max(min(span.stop, stop) - start, 0))
            exact = rows[counted]
            if not len(exact):
                continue
            missed = wide_product(integers[start:stop][counted].to(right.dtype), right)
            missed -= exact
            lost += torch.linalg.vector_norm(missed, dtype=summed).double().square()
            total += torch.linalg.vector_norm(exact, dtype=summed).double().square()
    return (lost / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
