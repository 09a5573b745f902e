"""Prefixes compressed with a calibration: bytes, files, errors, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from measured import calibrated
from transformers import PreTrainedModel

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.format import read_prefix, write_prefix
from xkv_artifacts.manifest import GroupLayout, PrefixManifest
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.limits import fidelity_limit
from xkv_service.compression import compress, compress_each, factorize_prefill
from xkv_service.errors import InvalidSpec, RatioUnreachable
from xkv_service.factorization import features
from xkv_service.factorization.ranks import size_of
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.packed_factors import PackedFactors
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import rebuild
from xkv_service.spec import CompressionSpec

IDS = random_ids(701)
Tensors = dict[str, torch.Tensor]


def spec_of(calibration: Calibration, **fields: Any) -> CompressionSpec:
    chosen = {"ratio": 2.5, "basis": "calibrated", "factor_dtype": "mixed", "index": "derived", **fields}
    return CompressionSpec(calibration=calibration.id, **chosen)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A window, then a group whose keys are wider than a column block."""
    return tiny_model("gemma2", num_key_value_heads=4, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def calibration(model: PreTrainedModel) -> Calibration:
    return calibrated(model)


WAYS = {
    f"{basis} {dtype} {index}": {"basis": basis, "factor_dtype": dtype, "index": index, "ratio": ratio}
    for basis, dtype, index, ratio in (
        ("calibrated", "mixed", "derived", 4.0),
        ("calibrated", "mixed", "sketch", 3.0),
        ("calibrated", "int4", "derived", 4.0),
        ("calibrated", "int8", "none", 2.5),
        ("calibrated", "mixed", "landmark", 3.0),
        ("document", "mixed", "derived", 2.5),
        ("document", "int4", "none", 2.5),
        ("document", "int8", "derived", 2.0),
    )
} | {
    f"document {dtype}, bases in 8 bits": {
        "basis": "document",
        "factor_dtype": dtype,
        "base_dtype": "int8",
        "ratio": 3.0,
    }
    for dtype in ("mixed", "int8")
}


@pytest.fixture(scope="module", params=WAYS)
def factors(
    request: pytest.FixtureRequest, model: PreTrainedModel, calibration: Calibration
) -> PrefixFactors:
    return compress(model, IDS, spec_of(calibration, **WAYS[request.param], recent=3), calibration)


@pytest.fixture(scope="module")
def mixed(model: PreTrainedModel, calibration: Calibration) -> PrefixFactors:
    return compress(model, IDS, spec_of(calibration), calibration)


def test_factors_survive_a_file_byte_for_byte(factors: PrefixFactors, calibration: Calibration) -> None:
    blob = io.BytesIO()
    tensors = factors.to_tensors()
    write_prefix(blob, manifest_of(factors), tensors)
    blob.seek(0)
    again = PrefixFactors.from_tensors(*read_prefix(blob), calibration)
    assert (again.spec, again.fidelity) == (factors.spec, factors.fidelity)
    assert [group.layout for group in again.groups] == [group.layout for group in factors.groups]
    returned = again.to_tensors()
    assert returned.keys() == tensors.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in tensors.items())
    for layer in factors.layers:
        for one, other in zip(rebuild(again, layer), rebuild(factors, layer), strict=True):
            assert torch.equal(one, other)


def test_the_file_takes_what_was_predicted_and_reaches_the_ratio(
    factors: PrefixFactors, model: PreTrainedModel, calibration: Calibration
) -> None:
    size = size_of(inspect_loaded(model).layout, len(IDS), factors.spec, None, calibration)
    assert size.groups == tuple(group.layout for group in factors.groups)
    assert size.bytes_tensors == factors.nbytes
    blob = io.BytesIO()
    write_prefix(blob, manifest_of(factors), factors.to_tensors())
    assert size.bytes_tensors < blob.tell() <= size.bytes_stored
    assert factors.spec.ratio is not None
    assert size.bytes_stored <= factors.bytes_full / factors.spec.ratio
    assert size.bytes_stored > 0.97 * factors.bytes_full / factors.spec.ratio


def test_a_rebuilt_layer_is_its_integers_times_scales_and_bases(
    factors: PrefixFactors, calibration: Calibration
) -> None:
    """Against tables of bits and bases, multiplied out plainly."""
    for layer in factors.layers:
        group, place = factors.locate(layer)
        assert group.values is not None
        for number, pair in enumerate((group.keys, group.values)):
            assert isinstance(pair.factors, PackedFactors)
            integers, width = pair.factors[:].double(), pair.widths[0]
            bases = pair.bases[:, place * width : (place + 1) * width].double()
            expected = (integers @ bases).reshape(len(IDS), 4, -1)
            found = rebuild(factors, layer)[number].double()
            inner = slice(4, -3)
            torch.testing.assert_close(found[inner], expected[inner], atol=1e-4, rtol=1e-4)
            if pair.shared is not None:
                assert pair.scales is not None
                kind = calibration.group_of(group.layout.layers).basis("value" if number else "key")
                plain = kind.bases[: pair.rank] * pair.scales[:, None]
                torch.testing.assert_close(pair.bases, plain)


@pytest.mark.parametrize("chunk", [2048, 100])  # the second one's last has none but a token kept exact
def test_the_error_reported_is_that_of_the_rounded_factors(
    model: PreTrainedModel, calibration: Calibration, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK_TOKENS_CPU", chunk)
    exact = prefill(model, IDS)
    factors, errors = factorize_prefill(model, exact, spec_of(calibration, recent=3), calibration)
    inner = slice(4, -3)
    for number, group in enumerate(factors.groups):
        for kind, reported in enumerate((errors.key_error[number], errors.value_error[number])):
            read = exact.values if kind else exact.keys
            layers = group.layout.layers
            states = torch.cat([read(layer)[inner].flatten(1) for layer in layers], 1)
            rebuilt = torch.cat([rebuild(factors, layer)[kind][inner].flatten(1) for layer in layers], 1)
            assert reported == pytest.approx(float((rebuilt - states).norm() / states.norm()), rel=1e-4)


def test_more_bytes_leave_less_error(model: PreTrainedModel, calibration: Calibration) -> None:
    exact = prefill(model, IDS)
    errors = [
        factorize_prefill(model, exact, spec_of(calibration, ratio=ratio), calibration)[1]
        for ratio in (1.5, 3.0, 6.0)
    ]
    assert errors[0].key_error < errors[1].key_error < errors[2].key_error
    assert errors[0].value_error < errors[1].value_error < errors[2].value_error


@pytest.mark.parametrize("tokens", [12, 30, 60])
def test_documents_shorter_than_the_ranks_are_compressed(
    model: PreTrainedModel, calibration: Calibration, tokens: int
) -> None:
    """Calibrated bases may have more directions than the document has tokens."""
    spec = spec_of(calibration, ratio=1.0, factor_dtype="int8", sink=0)
    full = inspect_loaded(model).layout.bytes_full(tokens)
    try:
        factors = compress(model, IDS[:tokens], spec, calibration)
    except RatioUnreachable:
        assert tokens < 60 and full < 30_000  # the header alone is larger
        return
    again = PrefixFactors.from_tensors(manifest_of(factors), factors.to_tensors(), calibration)
    assert again.tokens == tokens


def test_planes_come_from_the_calibration_and_nothing_else_is_stored(
    mixed: PrefixFactors, calibration: Calibration
) -> None:
    assert set(mixed.planes) == set(mixed.layers) and not mixed.sketches
    for layer, planes in mixed.planes.items():
        assert torch.equal(planes, calibration.planes[layer][:, : mixed.spec.sketch_planes])
    assert not any("codes" in name or "bases" in name for name in mixed.to_tensors())


def test_a_bf16_model_is_compressed() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = calibrated(model)
    for basis in ("calibrated", "document"):
        spec = spec_of(found, ratio=1.3, factor_dtype="int8", basis=basis)
        factors = compress(model, IDS[:300], spec, found)
        assert factors.fidelity is not None and factors.fidelity.kl < 0.05


def test_another_calibration_or_none_is_refused(model: PreTrainedModel, calibration: Calibration) -> None:
    other = replace(calibration, id="d" * 64)
    for spec, given in (
        (spec_of(calibration), None),
        (spec_of(calibration), other),
        (CompressionSpec(ratio=2.0), calibration),
    ):
        with pytest.raises(InvalidSpec, match="calibration"):
            compress(model, IDS, spec, given)
    with pytest.raises(InvalidSpec, match="other shapes or numbers"):
        compress(tiny_model("llama", max_position_embeddings=1024), IDS, spec_of(calibration), calibration)
    with pytest.raises(RatioUnreachable):
        compress(model, IDS[:100], spec_of(calibration, ratio=100.0), calibration)


def test_an_artifact_needs_the_calibration_it_was_made_with(
    mixed: PrefixFactors, calibration: Calibration
) -> None:
    for given in (None, replace(calibration, id="d" * 64)):
        with pytest.raises(InvalidSpec, match="which was not given"):
            PrefixFactors.from_tensors(manifest_of(mixed), mixed.to_tensors(), given)


def _columns(group: GroupLayout, **update: Any) -> dict[str, Any]:
    return {"groups": (GroupLayout.model_construct(**{**dict(group), **update}),)}


def _mixed(group: GroupLayout, count: Callable[[int], int]) -> dict[str, Any]:
    """Its first run of key columns changed in number."""
    (bits, found), *rest = group.columns_k
    return _columns(group, columns_k=((bits, count(found)), *rest))


HOSTILE: dict[str, Callable[[GroupLayout, dict[str, Any]], dict[str, Any]]] = {
    "a column too many": lambda group, spec: _mixed(group, lambda count: count + 1),
    "a column too few": lambda group, spec: _mixed(group, lambda count: count - 1),
    "columns beyond counting": lambda group, spec: _mixed(group, lambda count: 2**61),
    "no columns": lambda group, spec: _columns(group, columns_k=()),
    "no columns and no ranks": lambda group, spec: _columns(group, columns_k=(), rank_k=0),
    "unknown bits": lambda group, spec: _columns(group, columns_k=((3, group.rank_k),)),
    "bits twice": lambda group, spec: _columns(group, columns_v=((4, 1), (4, group.rank_v - 1))),
    "fewest bits first": lambda group, spec: _columns(group, columns_v=((2, 1), (8, group.rank_v - 1))),
    "other layers": lambda group, spec: _columns(group, layers=(2, 1)),
    "another width": lambda group, spec: _columns(group, key_widths=(32, 32)),
    "latents": lambda group, spec: _columns(
        group, kv_heads=(1, 1), value_widths=(0, 0), rank_v=0, columns_v=(), rope_widths=(8, 8)
    ),
    "bits that the spec has not": lambda group, spec: {"spec": {**spec, "factor_dtype": "int4"}},
    "floating point": lambda group, spec: {"spec": {**spec, "factor_dtype": "bfloat16"}},
    "columns without a calibration": lambda group, spec: {
        "spec": {**spec, "factor_dtype": "int8", "calibration": None, "basis": "document"}
    },
    "bases of no calibration": lambda group, spec: {"spec": {**spec, "calibration": None}},
    "a calibration that is no name": lambda group, spec: {"spec": {**spec, "calibration": 7}},
    "a calibration without a name": lambda group, spec: {"spec": {**spec, "calibration": ""}},
    "its own bases": lambda group, spec: {"spec": {**spec, "basis": "document"}},
    "a stored index": lambda group, spec: {"spec": {**spec, "index": "sketch"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_contradicts_itself_is_refused(
    case: str, mixed: PrefixFactors, calibration: Calibration
) -> None:
    manifest = manifest_of(mixed)
    changed = manifest.model_copy(update=HOSTILE[case](manifest.groups[0], manifest.spec))
    with pytest.raises(CorruptArtifact):
        PrefixFactors.from_tensors(changed, mixed.to_tensors(), calibration)


BAD_TENSORS: dict[str, tuple[str, Callable[[Tensors], torch.Tensor | None]]] = {
    "no scales": ("group.0.key.scales", lambda t: None),
    "scales of another length": ("group.0.key.scales", lambda t: t["group.0.key.scales"][:-1]),
    "scales of 16 bits": ("group.0.key.scales", lambda t: t["group.0.key.scales"].half()),
    "infinite scales": ("group.0.key.scales", lambda t: t["group.0.key.scales"] * torch.inf),
    "scales that are no number": ("group.0.value.scales", lambda t: t["group.0.value.scales"] * torch.nan),
    "bases of its own": ("group.0.key.bases.0", lambda t: torch.zeros(64, 128, dtype=torch.bfloat16)),
    "a byte too few": ("group.0.key.factors.0", lambda t: t["group.0.key.factors.0"][:, :-1]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_a_calibrated_prefix_must_not_have_are_refused(
    case: str, mixed: PrefixFactors, calibration: Calibration
) -> None:
    tensors = dict(mixed.to_tensors())
    name, change = BAD_TENSORS[case]
    changed = change(tensors)
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    with pytest.raises(CorruptArtifact, match=name):
        PrefixFactors.from_tensors(manifest_of(mixed), tensors, calibration)


def test_a_manifest_as_json_keeps_its_columns_and_refuses_unknown_bits(mixed: PrefixFactors) -> None:
    manifest = manifest_of(mixed)
    again = PrefixManifest.model_validate_json(manifest.model_dump_json())
    assert again.groups[0].columns_k == mixed.groups[0].layout.columns_k
    text = manifest.model_dump_json()
    for bad in ('"columns_k":[[16,1]]', '"columns_k":[[8,0]]', '"columns_k":[[8,-1]]', '"columns_k":8'):
        start = text.index('"columns_k":')
        stop = text.index("]]", start) + 2
        with pytest.raises(ValueError, match="columns_k"):
            PrefixManifest.model_validate_json(text[:start] + bad + text[stop:])


def test_one_prefill_serves_several_ways_to_compress(
    model: PreTrainedModel, calibration: Calibration
) -> None:
    """The exact cache that fidelity uses up is needed by none of them twice."""
    specs = [
        spec_of(calibration, basis="document", ratio=2.0),
        spec_of(calibration, ratio=100.0),  # cannot be reached
        spec_of(calibration, ratio=4.0),
        CompressionSpec(group_size=1, rank_k=5, rank_v=7, factor_dtype="float32"),
    ]
    found = compress_each(model, IDS, specs[:3], calibration) + compress_each(model, IDS, specs[3:])
    kept = [(specs[0], calibration), (specs[2], calibration), (specs[3], None)]
    for one, (spec, made) in zip(found, kept, strict=True):
        alone = compress(model, IDS, spec, made)
        assert (one.spec, one.fidelity) == (spec, alone.fidelity)
        for name, tensor in alone.to_tensors().items():
            assert torch.equal(one.to_tensors()[name], tensor), name


def test_the_calibrations_limit_goes_into_the_artifact(
    model: PreTrainedModel, calibration: Calibration
) -> None:
    figures = {
        **calibration.figures,
        "thresholds": [{"ratio": 3.0, "kl": 0.0125}, {"ratio": 9.0, "kl": 0.015}],
    }
    strict = replace(calibration, figures=figures)
    specs = [spec_of(calibration), spec_of(calibration, ratio=4.0)]
    found = [manifest_of(one).fidelity.kl_limit for one in compress_each(model, IDS, specs, strict)]
    assert found == [0.0125, 0.015]
    for made in (strict, calibration):
        alone = compress(model, IDS, specs[0], made).fidelity
        assert alone is not None and alone.kl_limit == fidelity_limit(2.5, made.figures)
