"""Un-rotating keys: against the models' own code, in families that rotate differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, tiny_model
from transformers import DynamicCache, PreTrainedModel

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.rotary import RotaryTable, inverse, rotate_planes
from xkv_service.modeling.rotary_source import Frequencies, fit_table
from xkv_service.prefilling.prefill import prefill

TOKENS = 40


def ids_of(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(1))


def keys_before_rope(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Each full layer's keys [T, heads, D] when its attention module is called again with cos 1 and sin 0."""
    calls: dict[int, tuple[Any, dict[str, Any]]] = {}
    modules = inspect_loaded(model).modules
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: calls.update({layer: (args, dict(kwargs))}),
            with_kwargs=True,
        )
        for layer, module in modules.items()
    ]
    with torch.inference_mode():
        model(ids[None], use_cache=True)
        for handle in handles:
            handle.remove()
        found = {}
        for layer, module in modules.items():
            args, kwargs = calls[layer]
            cache = DynamicCache()
            kwargs = {
                name: cache if isinstance(value, DynamicCache) else value for name, value in kwargs.items()
            }
            embeddings = kwargs.get("position_embeddings")
            if isinstance(embeddings, torch.Tensor):  # complex: deepseek_v2
                kwargs["position_embeddings"] = torch.ones_like(embeddings)
            elif embeddings is not None:
                cos, sin = embeddings
                kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
            module(*args, **kwargs)
            found[layer] = cache.layers[layer].keys[0].transpose(0, 1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_are_the_keys_before_rope(family: str) -> None:
    model = tiny_model(family)
    prefix = prefill(model, ids_of())
    positions = torch.arange(TOKENS)
    for layer, expected in keys_before_rope(model, ids_of()).items():
        table, cached, scale = prefix.rotary(layer), prefix.rotated_keys(layer), expected.abs().max()
        assert (prefix.keys(layer) - expected).abs().max() <= 1e-5 * scale
        assert (table.rotate(expected, positions) - cached).abs().max() <= 1e-5 * scale
        if prefix.planes(layer).shape[0] > 0:  # the two faults that matter are far outside the tolerance
            assert (table.unrotate(cached, positions + 1) - expected).norm() > 1e-2 * expected.norm()
            assert (cached - expected).norm() > 0.1 * expected.norm()


def test_layers_without_rope_have_no_planes() -> None:
    forms = inspect_loaded(tiny_model("smollm3")).forms
    assert [len(forms[layer].planes) for layer in range(3)] == [8, 0, 8]


@pytest.mark.parametrize(
    ("family", "first", "count"),
    [("llama", [0, 8], 8), ("cohere", [0, 1], 8), ("phi", [0, 4], 4), ("glm", [0, 1], 4)],
)
def test_planes_are_the_pairs_that_turn_together(family: str, first: list[int], count: int) -> None:
    planes = inspect_loaded(tiny_model(family)).forms[0].planes
    assert planes[0].tolist() == first
    assert planes.shape == (count, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_survive_the_round_trip(dtype: torch.dtype) -> None:
    model = tiny_model("llama-yarn", dtype=dtype)
    prefix = prefill(model, ids_of())
    cached = prefix.rotated_keys(1).clone()
    table = prefix.rotary(1)
    assert table.inv_freq is not None
    assert torch.equal(table.rotate(prefix.keys(1), torch.arange(TOKENS)).to(dtype), cached)


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_norm_after_rope_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match="rotary embedding of layer 0 cannot be inverted"):
        inspect_loaded(build(model_type))


@pytest.mark.parametrize("planes", [[(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 1), (2, 3)], [(1, 6), (2, 3)], []])
def test_rotation_equals_complex_multiplication(planes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 3, 8, generator=generator)
    pairs = torch.tensor(planes, dtype=torch.int64).reshape(-1, 2)
    angles = torch.randn(5, len(planes), generator=generator)
    cos, sin = 1.5 * angles.cos(), 1.5 * angles.sin()
    expected = keys.clone()
    for number, (x, y) in enumerate(planes):
        turned = torch.complex(keys[..., x], keys[..., y]) * torch.complex(cos, sin)[:, None, number]
        expected[..., x], expected[..., y] = turned.real, turned.imag
    turned = rotate_planes(keys, pairs, cos, sin)
    assert (turned - expected).abs().max() <= 1e-6
    assert (rotate_planes(turned, pairs, *inverse(cos, sin)) - keys).abs().max() <= 1e-6


def test_rotation_leaves_its_input_alone() -> None:
    keys = torch.randn(4, 2, 6)
    before = keys.clone()
    rotate_planes(keys, torch.tensor([[0, 1]]), torch.zeros(4, 1), torch.ones(4, 1))
    rotate_planes(keys, torch.empty(0, 2, dtype=torch.int64), torch.empty(4, 0), torch.empty(4, 0)).zero_()
    assert torch.equal(keys, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["llama", "llama-llama3", "llama-yarn", "phi3-longrope", "cohere", "gpt_oss"]
)
def test_frequencies_reproduce_far_positions(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype, max_position_embeddings=1 << 20)
    prefix = prefill(model, ids_of(100))
    layer = prefix.layout.compressible[0].index
    table = prefix.rotary(layer)
    assert table.inv_freq is not None
    positions = torch.tensor([[0, 1, 2, 127]])
    if family != "phi3-longrope":  # its frequencies change past the original window
        positions = torch.tensor([[0, 1, 77_777, 1_000_003]])
    embeddings = rotary_embedding(model)(torch.zeros(1, 1, dtype=dtype), positions)
    cos, sin = inspect_loaded(model).forms[layer].plane_tables(embeddings)
    found = table.cos_sin(positions[0])
    assert (found[0] - cos[0].float()).abs().max() <= 1e-6
    assert (found[1] - sin[0].float()).abs().max() <= 1e-6


def rotary_embedding(model: PreTrainedModel) -> Any:
    """The model's rotary module, or for several kinds of layers its full-attention part."""
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def test_tables_come_back_from_their_tensors() -> None:
    prefix = prefill(tiny_model("smollm3"), ids_of())
    for layer in range(3):
        table = prefix.rotary(layer)
        again = RotaryTable.from_tensors(table.to_tensors())
        rotated = prefix.rotated_keys(layer)
        positions = torch.arange(TOKENS)
        assert torch.equal(table.unrotate(rotated, positions), again.unrotate(rotated, positions))


def test_angles_without_a_formula_are_kept_and_end_where_they_were_seen() -> None:
    angles = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    wrong = Frequencies(torch.tensor([1.0, 0.5]), 1.0)
    table = fit_table(torch.tensor([[0, 1], [2, 3]]), angles.cos(), angles.sin(), [wrong])
    assert table.inv_freq is None
    back = RotaryTable.from_tensors(table.to_tensors())
    assert torch.equal(back.cos_sin(torch.tensor([5, 0]))[1], angles.sin()[[5, 0]])
    with pytest.raises(UnsupportedModel, match="known for 6 positions only"):
        back.cos_sin(torch.tensor([6]))


def test_dynamic_ntk_is_refused_past_its_window_only() -> None:
    model = tiny_model("llama-dynamic", max_position_embeddings=32)
    assert prefill(model, ids_of(32)).rotary(0).inv_freq is not None
    with pytest.raises(UnsupportedModel, match="past 32"):
        prefill(model, ids_of(33))


def test_longrope_uses_one_set_of_factors_for_all_chunks() -> None:
    model = tiny_model("phi3-longrope")  # short factors up to 128 positions
    ids = ids_of(150)
    with torch.inference_mode():
        whole = model(ids[None], use_cache=True).past_key_values
    prefix = prefill(model, ids, chunk_tokens=32)
    assert (prefix.rotated_keys(2) - whole.layers[2].keys[0].transpose(0, 1)).abs().max() <= 1e-4
    assert prefix.rotary(2).inv_freq is not None
    short = prefill(model, ids[:100], chunk_tokens=32)
    assert not torch.allclose(short.rotary(2).inv_freq, prefix.rotary(2).inv_freq)
