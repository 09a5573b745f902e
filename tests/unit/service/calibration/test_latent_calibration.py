"""Calibrations of latent attention (MLA): latents are keys without values, and the factors stay an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed import manifest_of, random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_artifacts.errors import CorruptArtifact
from xkv_service import SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.latent_metric import expansion_maps, latent_metric
from xkv_service.calibration.observed import Observed, calibrated_layers, observe_document
from xkv_service.calibration.plan import factor_bits
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.report_page import write_report
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.statistics import Statistics
from xkv_service.decoding import latent
from xkv_service.decoding.prefix import Prefix
from xkv_service.errors import InvalidSpec, RatioUnreachable, UnsupportedModel
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.packed_factors import PackedFactors
from xkv_service.reconstruct import dense_cache

SETTINGS = CalibrationSettings(
    ratio=2.0, ratios=(2.0,), group_size=2, most_ratio=1.5, weightings=("tolerance", "tolerance+both")
)
DEEPSEEK = LayerLayout(0, "latent", kv_heads=1, query_heads=128, head_dim=512, value_dim=64)
IDS = random_ids(300, seed=70)


def made(model: PreTrainedModel) -> Calibration:
    """A calibration of three random documents, stored and read."""
    sample = [ProbedPrefix.of_text(f"text {i}", random_ids(450, seed=i).tolist()) for i in range(3)]
    found = calibrate(model, sample, SETTINGS)
    groups = tuple(group.layers for group in found.groups)
    return Calibration.from_tensors(groups, found.to_tensors(), found.figures, "c" * 64)


@pytest.fixture(scope="module")
def deepseek() -> PreTrainedModel:
    return tiny_model("deepseek_v3")


@pytest.fixture(scope="module")
def calibration(deepseek: PreTrainedModel) -> Calibration:
    return made(deepseek)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3-yarn", "minicpm3", "glm4_moe_lite"])
def test_families_are_calibrated_and_what_was_measured_can_be_shown(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    found = made(model)
    layout = inspect_loaded(model).layout
    assert [layer for group in found.groups for layer in group.layers] == [0, 1, 2]
    assert all(group.values is None for group in found.groups) and not found.planes
    assert found.layer_groups(layout) and found.figures["weighting"] in SETTINGS.weightings
    assert {one["kind"] for one in found.figures["tolerances"]} == {"key"}
    assert set(found.figures["likeness"]) == set(found.figures["spectra"]) == {"key"}
    assert {row["step"] for row in found.figures["validation"] if "kl" in row} >= {"calibrated bases, bits"}
    write_report(json.loads(json.dumps(found.figures)), tmp_path / "report.html")
    assert "The plan over the layers" in (tmp_path / "report.html").read_text()


def test_layers_with_states_beside_latent_ones_are_calibrated() -> None:
    found = made(tiny_model("kimi_linear"))
    assert [group.layers for group in found.groups] == [(1, 3)]


@pytest.mark.parametrize("basis", ["calibrated", "document"])
@pytest.mark.parametrize("factor_dtype", ["mixed", "int8"])
def test_packed_latents_decode_as_the_dense_rebuild_does(
    deepseek: PreTrainedModel, calibration: Calibration, basis: str, factor_dtype: str
) -> None:
    spec = calibrated_spec(2.0, calibration, basis=basis, factor_dtype=factor_dtype)
    factors = compress(deepseek, IDS, spec, calibration)
    assert isinstance(factors.groups[0].keys.factors, PackedFactors)
    again = PrefixFactors.from_tensors(manifest_of(factors), factors.to_tensors(), calibration)
    suffix = random_ids(5, seed=71)[None]
    with torch.no_grad(), enable_xkv(deepseek):
        rebuilt = deepseek(suffix, past_key_values=dense_cache(deepseek, factors)).logits
        cache = XKVCache.from_factors(deepseek, again, SelectionSpec("dense"))
        found = deepseek(suffix, past_key_values=cache).logits
        exact = deepseek(torch.cat([IDS[None], suffix], 1)).logits[:, 300:]
    torch.testing.assert_close(found, rebuilt, atol=1e-5 * float(rebuilt.abs().max()), rtol=0)
    assert (found - exact).abs().max() > 100 * (found - rebuilt).abs().max()


@pytest.mark.parametrize("basis", ["calibrated", "document"])
def test_packed_columns_are_an_index(
    deepseek: PreTrainedModel, calibration: Calibration, basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All columns score as rebuilt keys do; the leading ones as latents rebuilt from them alone."""
    factors = compress(deepseek, IDS, calibrated_spec(2.0, calibration, basis=basis), calibration)
    prefix = Prefix.of(deepseek, factors).layers[1]
    heads, dim = prefix.value_bases.shape[0], prefix.exact_keys.shape[2]
    queries = torch.randn(heads, 7, dim, generator=torch.Generator().manual_seed(0))
    assert prefix.index is not None
    expected = queries @ prefix.keys(torch.arange(300)).permute(1, 2, 0)
    torch.testing.assert_close(
        prefix.index(queries), expected, atol=1e-4 * float(expected.abs().max()), rtol=0
    )

    monkeypatch.setattr(latent, "INDEX_RANK", 11)
    few = Prefix.of(deepseek, compress(deepseek, IDS, factors.spec, calibration)).layers[1]
    group, place = factors.locate(1)
    latents = group.keys.factors[:][:, :11].float() @ group.keys.layer_bases(place)[:11].float()
    with torch.no_grad():
        rows = latents[None, None], factors.rope_keys[1].float()[None, None]
        keys, _ = deepseek.model.layers[1].self_attn.expand_kv(*rows)
    expected = queries @ keys[0].mT
    assert few.index is not None
    torch.testing.assert_close(few.index(queries), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_selecting_by_packed_columns_finds_what_exact_scores_find(
    deepseek: PreTrainedModel, calibration: Calibration
) -> None:
    factors = compress(deepseek, IDS, calibrated_spec(2.0, calibration), calibration)
    logits = []
    with torch.no_grad(), enable_xkv(deepseek):
        for selector in ("auto", "exact"):
            cache = XKVCache.from_factors(deepseek, factors, SelectionSpec(selector, budget=20, recent=0))  # type: ignore[arg-type]
            logits.append(deepseek(IDS[None, :1], past_key_values=cache).logits)
            assert cache.rebuilt_tokens == 20
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_the_metric_is_what_errors_do_to_scores_and_outputs(deepseek: PreTrainedModel) -> None:
    layer = inspect_loaded(deepseek).layout.compressible[1]
    keys, values, _ = (one.double() for one in expansion_maps(deepseek, layer))
    dim = keys.shape[-1]
    roots = torch.randn(4, dim, dim, generator=torch.Generator().manual_seed(0)).double()
    queries = roots @ roots.mT
    metric = latent_metric(deepseek, layer, queries)[0]
    projection = deepseek.model.layers[1].self_attn.o_proj.weight.detach().double()
    per_head = projection.reshape(64, 4, -1).transpose(0, 1)
    errors = torch.randn(1000, layer.head_dim, generator=torch.Generator().manual_seed(1)).double()

    def caused(errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = ((errors @ keys) @ roots).square().sum((0, 2))
        outputs = torch.einsum("hev,hov->heo", errors @ values, per_head).square().sum((0, 2))
        return scores, outputs

    units = caused(torch.eye(layer.head_dim).double())
    expected = sum(one / unit.sum() for one, unit in zip(caused(errors), units, strict=True))
    found = ((errors @ metric) * errors).sum(1)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)  # the floors that keep it definite


def test_sums_are_kept_and_drawn_again(deepseek: PreTrainedModel, calibration: Calibration) -> None:
    kept = calibration.figures["stability"]["kept"]
    assert 0.5 < kept["low"] <= kept["high"] < 1.1
    found = Observed.nothing(deepseek, 1)
    observe_document(deepseek, ProbedPrefix.of_text("text", random_ids(200).tolist()), found)
    tensors = Statistics(found, frozenset({"0" * 64})).to_tensors()
    layers = found.moments.layers
    again = Statistics.from_tensors(tensors, calibration, layers, 1, torch.device("cpu")).observed
    assert (again.moments.tokens, again.moments.kinds, again.planes) == (found.moments.tokens, ("key",), [])
    for mine, other in zip(again.queries, found.queries, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    gram = found.moments.gram("key", 0, 2)
    torch.testing.assert_close(again.moments.gram("key", 0, 2), gram, rtol=1e-4, atol=1e-6)


def test_default_ratios_are_those_of_what_is_compressed() -> None:
    settings = CalibrationSettings.of([DEEPSEEK] * 61)
    assert settings.ratios == (4.5, 6.43, 7.2, 7.71) and settings.ratio == 7.71
    assert settings.most_ratio == 3.0
    assert factor_bits([DEEPSEEK], 4.5) == pytest.approx(16 * 512 / 8, rel=1e-3)
    assert factor_bits([DEEPSEEK], 9.0) == 0
    full = LayerLayout(0, "full", kv_heads=8, query_heads=32, head_dim=128, value_dim=128)
    assert CalibrationSettings.of([full]) == CalibrationSettings()
    asked = CalibrationSettings.of([DEEPSEEK], ratio=5.0, group_size=2)
    assert (asked.ratio, asked.group_size, 5.0 in asked.ratios) == (5.0, 2, True)
    with pytest.raises(RatioUnreachable, match="11.1% of the cache are rotated keys"):
        CalibrationSettings.of([DEEPSEEK], ratio=9.0)


def test_one_kind_of_attention_is_not_taken_for_the_other(calibration: Calibration) -> None:
    tensors = calibration.to_tensors()
    full = inspect_loaded(tiny_model("llama")).layout
    with pytest.raises(InvalidSpec, match="of other shapes"):
        calibration.layer_groups(full)
    groups = tuple(group.layers for group in calibration.groups)
    values = {name.replace("key", "value"): one for name, one in tensors.items()}
    with pytest.raises(CorruptArtifact, match="planes is missing"):
        Calibration.from_tensors(groups, {**tensors, **values}, {}, "")
    planes = {f"layer.{layer}.planes": torch.zeros(1, 16, 2, dtype=torch.int16) for layer in range(3)}
    both = Calibration.from_tensors(groups, {**tensors, **values, **planes}, {}, "")
    with pytest.raises(InvalidSpec, match="of other shapes"):
        both.layer_groups(inspect_loaded(tiny_model("deepseek_v3")).layout)
    with pytest.raises(UnsupportedModel, match="full and of latent attention"):
        calibrated_layers(ModelLayout((*full.layers, DEEPSEEK)))
