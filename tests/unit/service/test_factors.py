"""Prefix factors as tensors and back, and every way a file can lie about them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.format import read_prefix, write_prefix
from xkv_artifacts.manifest import PrefixManifest
from xkv_service.compression import compress
from xkv_service.factorization.ranks import size_of
from xkv_service.factors import PrefixFactors
from xkv_service.reconstruct import rebuild
from xkv_service.spec import CompressionSpec
from xkv_service.stored import stored_tensors

Tensors = dict[str, torch.Tensor]

SPECS = {
    "sketch": CompressionSpec(group_size=2, ratio=1.5, sink=2, recent=3, sketch_planes=4),
    "landmark": CompressionSpec(group_size=2, rank_k=20, rank_v=70, index="landmark", outlier_chunks=2),
    "none": CompressionSpec(group_size=2, rank_k=20, rank_v=30, index="none", sink=0, dtype="float16"),
    "integer bases": CompressionSpec(group_size=2, ratio=1.5, base_dtype="int8"),
    "integer bases alone": CompressionSpec(
        group_size=2, rank_k=20, rank_v=70, base_dtype="int8", factor_dtype="bfloat16"
    ),
}

# Every kind of layer; kimi_linear has latents, and states of two dtypes.
KINDS = {
    **dict.fromkeys(SPECS, "gemma2"),
    **{family: family for family in ("deepseek_v3", "kimi_linear", "lfm2")},
}
RATIO = CompressionSpec(group_size=2, ratio=1.2, index="landmark", sink=2, landmark_chunk=32)


def model_of(name: str) -> PreTrainedModel:
    """Its group's keys are wider than a column block."""
    if name in SPECS:
        return tiny_model("gemma2", num_key_value_heads=4, max_position_embeddings=1024)
    wide = {"kv_lora_rank": 48} if name in ("deepseek_v3", "kimi_linear") else {"num_key_value_heads": 4}
    return tiny_model(name, dtype=torch.bfloat16, max_position_embeddings=1024, **wide)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PrefixFactors]:
    model = model_of(request.param)
    return model, compress(model, random_ids(701), SPECS.get(request.param, RATIO))


@pytest.fixture(scope="module")
def factors(case: tuple[PreTrainedModel, PrefixFactors]) -> PrefixFactors:
    return case[1]


@pytest.fixture(scope="module")
def latent() -> PrefixFactors:
    return compress(tiny_model("kimi_linear"), random_ids(301), SPECS["none"])


@pytest.fixture(scope="module")
def sketched() -> PrefixFactors:
    return compress(tiny_model("gemma2", num_key_value_heads=4), random_ids(301), SPECS["sketch"])


def test_factors_survive_tensors_and_a_file_byte_for_byte(factors: PrefixFactors) -> None:
    tensors = factors.to_tensors()
    blob = io.BytesIO()
    write_prefix(blob, manifest_of(factors), tensors)
    blob.seek(0)
    again = PrefixFactors.from_tensors(*read_prefix(blob))
    assert (again.spec, again.tokens, again.bytes_full) == (factors.spec, factors.tokens, factors.bytes_full)
    assert again.fidelity == factors.fidelity
    assert [group.layout for group in again.groups] == [group.layout for group in factors.groups]
    returned = again.to_tensors()
    assert returned.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(returned[name], tensor), name


def test_predicted_bytes_are_the_real_ones_and_the_file_is_no_larger(
    case: tuple[PreTrainedModel, PrefixFactors],
) -> None:
    from xkv_service.modeling.inspect import inspect_model

    model, factors = case
    size = size_of(inspect_model(model), factors.tokens, factors.spec)
    tensors = factors.to_tensors()
    assert size.groups == tuple(group.layout for group in factors.groups)
    assert size.bytes_tensors == factors.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    blob = io.BytesIO()
    write_prefix(blob, manifest_of(factors), tensors)
    assert size.bytes_tensors < blob.tell() <= size.bytes_stored
    if factors.spec.ratio:
        assert blob.tell() <= factors.bytes_full / factors.spec.ratio


def test_stored_names_shapes_and_dtypes_are_the_tables(factors: PrefixFactors) -> None:
    fields = factors.manifest_fields()
    table = stored_tensors(
        factors.spec, factors.tokens, fields["groups"], fields["windows"], fields["states"]
    )
    tensors = {
        name: tensor for name, tensor in factors.to_tensors().items() if not name.startswith("rotary.")
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        name: (stored.shape, stored.dtype) for name, stored in table.items()
    }


def test_column_blocks_are_of_64_ranks(factors: PrefixFactors) -> None:
    rank = factors.groups[0].keys.rank
    blocks = [
        tensor for name, tensor in factors.to_tensors().items() if name.startswith("group.0.key.factors")
    ]
    assert [block.shape[1] for block in blocks] == [64] * (rank // 64) + [rank % 64] * bool(rank % 64)


def test_leading_bases_are_a_layers_own(sketched: PrefixFactors) -> None:
    group, position = sketched.locate(2)
    assert position == 1
    assert torch.equal(group.keys.layer_bases(1), group.keys.bases[:, group.layout.key_widths[0] :])
    with pytest.raises(KeyError):
        sketched.locate(0)


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def changed(tensors: Tensors) -> None:
        tensors[name] = how(tensors[name])

    return changed


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


BAD_TENSORS = {
    "tokens": drop("tokens"),
    "group.0.key.factors.0": change("group.0.key.factors.0", lambda t: t[:-1]),
    "group.0.value.bases.0": change("group.0.value.bases.0", lambda t: t.float()),
    "layer.1.sketch.codes": change("layer.1.sketch.codes", lambda t: t[..., :-1]),
    "layer.2.sketch.planes": change("layer.2.sketch.planes", lambda t: t + 100),
    "layer.1.exact.positions": change("layer.1.exact.positions", lambda t: t + 300),
    "layer.2.exact.positions": change("layer.2.exact.positions", lambda t: t.flip(0)),
    "layer.2.exact.keys": change("layer.2.exact.keys", lambda t: t.transpose(0, 1)),
    "layer.0.window.keys": drop("layer.0.window.keys"),
    "rotary.0.planes": change("rotary.0.planes", lambda t: t * 0),
    "rotary.0.inv_freq": change("rotary.0.inv_freq", lambda t: t[:-1]),
    "rotary.0.rounding": change("rotary.0.rounding", lambda t: t + 99),
    "extra": lambda tensors: tensors.update(extra=torch.zeros(1)),
    "rotary.7.planes": lambda tensors: tensors.update(
        {"rotary.7.planes": torch.zeros(0, 2, dtype=torch.int32)}
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_tensor_that_is_not_what_the_manifest_says_is_refused(name: str, sketched: PrefixFactors) -> None:
    tensors = dict(sketched.to_tensors())
    BAD_TENSORS[name](tensors)
    with pytest.raises(CorruptArtifact, match=r"tensor|rotary"):
        PrefixFactors.from_tensors(manifest_of(sketched), tensors)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_scales_of_integer_bases_that_are_no_numbers_are_refused(number: float) -> None:
    made = compress(tiny_model("gemma2", num_key_value_heads=4), random_ids(301), SPECS["integer bases"])
    tensors = made.to_tensors()
    tensors["group.0.value.scales"][1] = number
    with pytest.raises(CorruptArtifact, match=r"group\.0\.value\.scales is not finite"):
        PrefixFactors.from_tensors(manifest_of(made), tensors)


def test_bases_in_8_bits_rebuild_what_bases_in_16_bits_do() -> None:
    model, ids = tiny_model("gemma2", num_key_value_heads=4), random_ids(301)
    ranks = CompressionSpec(group_size=2, rank_k=20, rank_v=30, index="none", factor_dtype="float32")
    plain = compress(model, ids, ranks)
    rounded = compress(model, ids, replace(ranks, base_dtype="int8"))
    for layer in plain.layers:
        for one, other in zip(rebuild(rounded, layer), rebuild(plain, layer), strict=True):
            assert float((one - other).norm() / other.norm()) < 0.02
    saved = plain.nbytes - rounded.nbytes
    rows = sum(group.layout.rank_k + group.layout.rank_v for group in plain.groups)
    widths = sum(
        group.keys.bases.numel() + (0 if group.values is None else group.values.bases.numel())
        for group in plain.groups
    )
    assert saved == widths - 4 * rows


BAD_GROUPS = {
    "no layers": {"layers": ()},
    "heads that do not divide": {"kv_heads": (3, 3)},
    "zero heads": {"kv_heads": (0, 0)},
    "one width": {"key_widths": (32,)},
    "a layer twice": {"layers": (1, 1)},
    "a window's layer": {"layers": (0, 1)},
    "more ranks than tensors": {"rank_k": 2**60},
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_manifest_that_contradicts_itself_is_refused(case: str, sketched: PrefixFactors) -> None:
    manifest = manifest_of(sketched)
    group = manifest.groups[0].model_copy(update=BAD_GROUPS[case])
    with pytest.raises(CorruptArtifact):
        PrefixFactors.from_tensors(manifest.model_copy(update={"groups": (group,)}), sketched.to_tensors())


BAD_LATENT_TENSORS = {
    "layer.1.rope_key": change("layer.1.rope_key", lambda t: t[:, :-1]),
    "layer.3.rope_key": drop("layer.3.rope_key"),
    "layer.0.state.conv.0": change("layer.0.state.conv.0", lambda t: t[..., :-1]),
    "layer.0.state.conv.1": drop("layer.0.state.conv.0"),
    "layer.2.state.recurrent.0": change("layer.2.state.recurrent.0", lambda t: t.half()),
    "layer.2.state.recurrent.9": lambda tensors: tensors.update(
        {"layer.2.state.recurrent.9": torch.zeros(1)}
    ),
    "group.0.value.factors.0": lambda tensors: tensors.update({"group.0.value.factors.0": torch.zeros(1)}),
    "layer.1.exact.values": lambda tensors: tensors.update({"layer.1.exact.values": torch.zeros(0, 1, 0)}),
}


@pytest.mark.parametrize("name", BAD_LATENT_TENSORS)
def test_latents_and_states_that_are_not_what_the_manifest_says_are_refused(
    name: str, latent: PrefixFactors
) -> None:
    tensors = dict(latent.to_tensors())
    BAD_LATENT_TENSORS[name](tensors)
    with pytest.raises(CorruptArtifact, match="tensor"):
        PrefixFactors.from_tensors(manifest_of(latent), tensors)


BAD_LATENT_GROUPS = {
    "two heads": {"kv_heads": (2, 2)},
    "values": {"value_widths": (8, 8)},
    "ranks of values": {"rank_v": 4},
    "no latents": {"key_widths": (0, 0)},
    "no rotated keys": {"rope_widths": (0, 8)},
    "one width": {"rope_widths": (8,)},
    "a width too many": {"rope_widths": (8, 8, 8)},
    "wide rotated keys": {"rope_widths": (2**31 - 1, 2**31 - 1)},
    "not latent": {"rope_widths": ()},
    "a state's layer": {"layers": (0, 1)},
}


@pytest.mark.parametrize("case_name", BAD_LATENT_GROUPS)
def test_a_manifest_that_contradicts_itself_about_latents_is_refused(
    case_name: str, latent: PrefixFactors
) -> None:
    manifest = manifest_of(latent)
    group = manifest.groups[0].model_copy(update=BAD_LATENT_GROUPS[case_name])
    with pytest.raises(CorruptArtifact):
        PrefixFactors.from_tensors(manifest.model_copy(update={"groups": (group,)}), latent.to_tensors())


def test_values_without_ranks_are_refused(sketched: PrefixFactors) -> None:
    manifest = manifest_of(sketched)
    group = manifest.groups[0].model_copy(update={"rank_v": 0})
    with pytest.raises(CorruptArtifact, match="no rank for its values"):
        PrefixFactors.from_tensors(manifest.model_copy(update={"groups": (group,)}), sketched.to_tensors())


@pytest.mark.parametrize(
    "shape", [{"shape": (2**61, 2**61)}, {"shape": ()}, {"shape": (1,) * 8}, {"dtype": "float16"}]
)
def test_states_of_other_shapes_are_refused(shape: dict[str, object], latent: PrefixFactors) -> None:
    manifest = manifest_of(latent)
    state = manifest.states[0]
    other = state.model_copy(update={"conv": (state.conv[0].model_copy(update=shape), *state.conv[1:])})
    with pytest.raises(CorruptArtifact, match=r"tensor layer\.0\.state\.conv\.0"):
        PrefixFactors.from_tensors(
            manifest.model_copy(update={"states": (other, *manifest.states[1:])}), latent.to_tensors()
        )


def test_a_layer_with_a_state_and_a_window_is_refused(latent: PrefixFactors) -> None:
    manifest = manifest_of(latent)
    doubled = manifest.model_copy(update={"states": (*manifest.states, manifest.states[0])})
    with pytest.raises(CorruptArtifact, match="names a layer twice"):
        PrefixFactors.from_tensors(doubled, latent.to_tensors())


def test_fields_without_use_are_not_written(sketched: PrefixFactors, latent: PrefixFactors) -> None:
    """A file of full attention is the one that the first readers know."""
    old, new = manifest_of(sketched).model_dump(mode="json"), manifest_of(latent).model_dump(mode="json")
    assert "states" not in old and "rope_widths" not in old["groups"][0]
    assert len(new["states"]) == 2 and new["groups"][0]["rope_widths"] == [8, 8]


@pytest.mark.parametrize(
    "update", [{"spec": {"ratio": "x"}}, {"spec": {"colour": 1}}, {"groups": ()}, {"tokens": 300}]
)
def test_a_bad_header_is_refused(update: dict[str, object], sketched: PrefixFactors) -> None:
    manifest: PrefixManifest = manifest_of(sketched).model_copy(update=update)
    with pytest.raises(CorruptArtifact):
        PrefixFactors.from_tensors(manifest, sketched.to_tensors())


def test_an_artifact_without_fidelity_has_no_manifest(sketched: PrefixFactors) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="fidelity"):
        replace(sketched, fidelity=None).manifest_fields()
