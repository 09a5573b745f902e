"""Joined products: one product for modules of one input, the model's weights as they were."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from xkv_service import enable_xkv
from xkv_service.modeling import joined_products
from xkv_service.modeling.joined_products import JoinedLinear, join_products

IDS = torch.arange(3, 20)[None]
JOINED = {
    "llama": 6,
    "llama-biased": 6,
    "qwen2": 6,
    "qwen3": 6,
    "gemma": 6,
    "gemma2": 6,
    "olmo2": 6,
    "cohere": 6,
}
"""Groups of three layers: queries, keys and values; gate and up."""


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def joined(model: PreTrainedModel) -> list[JoinedLinear]:
    return [one for one in model.modules() if isinstance(one, JoinedLinear)]


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_model("qwen2")
    assert join_products(model) == 6
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Output features of the joint products that are computed."""
    seen: list[int] = []
    real = joined_products.linear

    def counted(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(weight.shape[0])
        return real(states, weight, bias)

    monkeypatch.setattr(joined_products, "linear", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_did(family: str) -> None:
    """Whatever is joined of it, alone and in a batch."""
    model = tiny_model(family)
    batch = IDS.repeat(3, 1) + torch.arange(3)[:, None]
    before = logits(model), logits(model, batch), logits(model, IDS[:, :1])
    state = {name: one.clone() for name, one in model.state_dict().items()}
    groups = join_products(model)
    assert groups == JOINED.get(family, groups)
    after = logits(model), logits(model, batch), logits(model, IDS[:, :1])
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(one, state[name]) for name, one in found.items())


def test_a_model_of_fused_products_stays_as_it_is() -> None:
    """Phi-3 has one product for queries, keys and values, and one for gate and up."""
    model = tiny_model("phi3-longrope")
    assert join_products(model) == 0 and not joined(model)


def test_weights_are_views_of_the_joint_one(model: PreTrainedModel) -> None:
    groups = {id(one.joint): one.joint for one in joined(model)}
    assert len(groups) == 6 and sum(joint.bias is not None for joint in groups.values()) == 3
    for one in joined(model):
        start = sum(one.joint.sizes[: one.place])
        for whole, part in ((one.joint.weight, one.weight), (one.joint.bias, one.bias)):
            if whole is not None:
                assert part.data_ptr() == whole[start].data_ptr() and isinstance(part, nn.Parameter)
                assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_each_group_is_one_product(model: PreTrainedModel, products: list[int]) -> None:
    logits(model)
    assert products == [64 + 32 + 32, 80 + 80] * 3
    assert getattr(joined_products._THREAD, "made", None) is None  # nothing waits to be taken


def test_it_is_joined_once(model: PreTrainedModel) -> None:
    before = [one.joint for one in joined(model)]
    assert join_products(model) == 0
    assert [one.joint for one in joined(model)] == before


def test_a_saved_model_is_the_one_before(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = logits(model)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, one), (_, other) in zip(model.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)


def test_weights_that_are_loaded_into_it_count(model: PreTrainedModel) -> None:
    other = tiny_model("qwen2", seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=1e-4)


def parts(model: PreTrainedModel) -> tuple[JoinedLinear, JoinedLinear, JoinedLinear]:
    attention = model.model.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def plain(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(states, module.weight, module.bias)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1, 1, 1), (2,)])
def test_modules_may_be_called_in_any_order(model: PreTrainedModel, order: tuple[int, ...]) -> None:
    states, every = torch.randn(2, 5, 64), parts(model)
    for place in (*order, *order):
        torch.testing.assert_close(every[place](states), plain(every[place], states))


@torch.no_grad()
def test_another_input_has_its_own_product(model: PreTrainedModel) -> None:
    first, second, _ = parts(model)
    one, equal, other = torch.randn(1, 4, 64), torch.randn(1, 4, 64), torch.randn(2, 3, 64)
    first(one)
    for states in (equal, other, one, one[:, :2], other):
        torch.testing.assert_close(second(states), plain(second, states))


def add_one(model: PreTrainedModel, states: torch.Tensor) -> None:
    states.add_(1)


def change_a_view(model: PreTrainedModel, states: torch.Tensor) -> None:
    states[:, 1].zero_()


def change_a_weight(model: PreTrainedModel, states: torch.Tensor) -> None:
    parts(model)[1].weight.mul_(2)


def replace_a_weight(model: PreTrainedModel, states: torch.Tensor) -> None:
    parts(model)[1].weight = nn.Parameter(torch.randn(32, 64))


def replace_a_bias(model: PreTrainedModel, states: torch.Tensor) -> None:
    parts(model)[1].bias = nn.Parameter(torch.randn(32))


def point_elsewhere(model: PreTrainedModel, states: torch.Tensor) -> None:
    parts(model)[1].weight.data = torch.randn(32, 64)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [add_one, change_a_view, change_a_weight, replace_a_weight, replace_a_bias, point_elsewhere]
)
def test_what_is_changed_between_the_parts_counts(
    model: PreTrainedModel, change: Callable[[PreTrainedModel, torch.Tensor], None]
) -> None:
    states, every = torch.randn(1, 4, 64), parts(model)
    every[0](states)
    change(model, states)
    for one in every[1:]:
        torch.testing.assert_close(one(states), plain(one, states))
    every[0](states)
    torch.testing.assert_close(every[1](states), plain(every[1], states))


@torch.no_grad()
def test_a_bias_that_is_removed_is_not_added(model: PreTrainedModel) -> None:
    second, states = parts(model)[1], torch.randn(1, 4, 64)
    second.bias.fill_(1)
    parts(model)[0](states)
    second.bias = None
    torch.testing.assert_close(second(states), plain(second, states))


def test_another_dtype_is_computed_plainly(model: PreTrainedModel, products: list[int]) -> None:
    expected = logits(model)
    products.clear()
    model.double()
    assert model.dtype == torch.float64
    torch.testing.assert_close(logits(model), expected.double(), atol=1e-4, rtol=1e-4)
    assert not products


def test_a_copy_has_weights_of_its_own(model: PreTrainedModel) -> None:
    expected = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        parts(other)[0].weight.zero_()
        assert not logits(other).allclose(expected)
    torch.testing.assert_close(logits(model), expected)


def test_gradients_go_to_each_weight(model: PreTrainedModel, products: list[int]) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not products and all(bool(one.weight.grad.any()) for one in joined(model))


def test_inference_mode_is_computed_plainly(model: PreTrainedModel, products: list[int]) -> None:
    """Its tensors do not tell whether they were changed."""
    expected = logits(model)
    products.clear()
    with torch.inference_mode():
        found = model(input_ids=IDS, use_cache=False).logits
    assert not products
    torch.testing.assert_close(found.clone(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_parts_that_nobody_takes_go_with_their_input(model: PreTrainedModel) -> None:
    states = torch.randn(1, 4, 64)
    parts(model)[0](states)
    made = joined_products._THREAD.made
    assert set(made.parts) == {1, 2}
    del states
    assert not made.parts


@torch.no_grad()
def test_threads_do_not_take_each_others_parts(model: PreTrainedModel, products: list[int]) -> None:
    """Both are between two products, one of the same input."""
    states, every, turn = torch.randn(1, 4, 64), parts(model), threading.Barrier(2, timeout=30)
    found: dict[int, list[torch.Tensor]] = {}

    def run(number: int) -> None:
        mine = states if number else torch.randn(1, 4, 64)
        with torch.no_grad():
            found[number] = [mine]
            for one in every:
                found[number].append(one(mine))
                turn.wait()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert products == [128, 128]
    for mine, *made in found.values():
        for one, product in zip(every, made, strict=True):
            torch.testing.assert_close(product, plain(one, mine))


def test_what_others_hold_on_to_is_left_alone() -> None:
    """Tied weights, modules with hooks, modules whose forward was replaced."""
    model = tiny_model("llama")
    tied, hooked, replaced = (layer.self_attn for layer in model.model.layers)
    tied.k_proj.weight = tied.v_proj.weight
    hooked.q_proj.register_forward_hook(lambda *_: None)
    replaced.q_proj.forward = replaced.q_proj.forward
    expected = logits(model)
    assert join_products(model) == 5  # of the others' queries, keys and values two each, of `tied` none
    names = {name for name, one in model.named_modules() if isinstance(one, JoinedLinear)}
    assert {name for name in names if "self_attn" in name} == {
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (1, 2) for part in "kv"
    }
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def flat(queries: torch.Tensor, *_: torch.Tensor) -> None:
    queries.transpose(1, 2).view(-1)


def checked(queries: torch.Tensor, *_: torch.Tensor) -> None:
    assert queries.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("needed", [flat, checked])
def test_a_model_that_needs_parts_in_one_piece_is_left_alone(
    needed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = modeling_llama.apply_rotary_pos_emb

    def needing(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        needed(*args)
        found: tuple[torch.Tensor, torch.Tensor] = real(*args)
        return found

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", needing)
    is_left_alone(tiny_model("llama"), caplog)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_products_that_come_out_wrong_are_separate_again(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = joined_products.linear

    def spoiled(*args: torch.Tensor | None) -> torch.Tensor:
        return real(*args) * wrong

    monkeypatch.setattr(joined_products, "linear", spoiled)
    is_left_alone(tiny_model("llama"), caplog)


def test_where_memory_is_full_all_are_separate_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Groups that had room, too: nobody compared them."""
    real, made = joined_products._laid_together, []

    def full(*args: Any) -> torch.Tensor:
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(joined_products, "_laid_together", full)
    is_left_alone(tiny_model("llama"), caplog)
    assert len(made) == 3


def is_left_alone(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(model)
    assert join_products(model) == 0 and not joined(model)
    assert caplog.text.count("stay separate") == 1
    assert torch.equal(logits(model), expected)


def test_hooks_see_what_they_saw(model: PreTrainedModel) -> None:
    """Those that come later, too."""
    seen: list[torch.Tensor] = []
    key = parts(model)[1]
    handle = key.register_forward_hook(
        lambda module, args, output: seen.append(output - plain(module, args[0]))
    )
    logits(model)
    handle.remove()
    assert len(seen) == 1 and float(seen[0].abs().max()) < 1e-4


def test_it_runs_inside_enable_xkv() -> None:
    model = tiny_model("llama")
    expected = logits(model)
    with torch.no_grad(), enable_xkv(model):
        assert join_products(model) == 6
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
