"""Compiled norms and rotary embedding compute what the model's own do, in their place and nowhere else."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn
from transformers import PreTrainedModel

from xkv_service.engine import compiled_step
from xkv_service.engine.compiled_step import CompiledStep
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.joined_products import few_logits, join_products

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Functions called in the place of the model's own, and on which thread; they compile nothing."""
    seen: list[tuple[str, int]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((function.__qualname__, threading.get_ident()))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(compiled_step, "_compiled", watched)
    return seen


def rotary(model: PreTrainedModel) -> Any:
    module = next(iter(inspect_loaded(model).modules.values()))
    return vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelno >= logging.WARNING]


def norms(model: PreTrainedModel) -> list[nn.Module]:
    return [one for one in model.modules() if type(one).__name__.endswith("RMSNorm")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norm"), [("llama", 2), ("qwen3", 4), ("gemma2", 4)])
def test_a_model_computes_what_it_did(family: str, norm: int, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled in full when it is made: no other number of tokens compiles anything."""
    model = tiny_model(family)
    join_products(model)
    before = {tokens: few_logits(model, tokens) for tokens in (1, 2, 3, 4, 8, 48)}
    found = CompiledStep(model, on=True)
    assert warnings(caplog) == [] and found.on
    assert len(norms(model)) == 1 + norm * model.config.num_hidden_layers
    for tokens, expected in before.items():
        with torch._dynamo.config.patch(error_on_recompile=True), found.in_place():  # type: ignore[no-untyped-call]
            logits = few_logits(model, tokens)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert found.on


def test_they_run_in_place_and_nowhere_else(calls: list[tuple[str, int]]) -> None:
    model = tiny_model("qwen3")
    own = rotary(model)
    found = CompiledStep(model, on=True)
    calls.clear()
    few_logits(model)
    assert not calls
    with pytest.raises(KeyError), found.in_place():
        few_logits(model)
        assert rotary(model) is not own
        raise KeyError
    layers = model.config.num_hidden_layers
    assert sum("rotary" in name for name, _ in calls) == layers
    assert sum("RMSNorm" in name for name, _ in calls) == 1 + 4 * layers
    assert rotary(model) is own and not any("forward" in vars(one) for one in norms(model))


def test_other_threads_run_the_models_own_meanwhile(calls: list[tuple[str, int]]) -> None:
    model = tiny_model("llama")
    expected, found = few_logits(model), CompiledStep(model, on=True)
    calls.clear()
    other: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            other.append(few_logits(model))

    with found.in_place():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not calls
        few_logits(model)
    assert {thread for _, thread in calls} == {threading.get_ident()}
    torch.testing.assert_close(other[0], expected)


def test_one_that_is_made_meanwhile_has_the_models_own(calls: list[tuple[str, int]]) -> None:
    """Models of one class share the rotary embedding."""
    model, other = tiny_model("llama"), tiny_model("llama")
    own, found = rotary(model), CompiledStep(model, on=True)
    functions: list[Any] = []

    def make() -> None:
        functions.extend(site.own for site in CompiledStep(other, on=True)._sites)

    with found.in_place():
        thread = threading.Thread(target=make)
        thread.start()
        thread.join(0.5)
    thread.join()
    assert own in functions and rotary(model) is own


def test_off_nothing_is_compiled(calls: list[tuple[str, int]]) -> None:
    model = tiny_model("llama")
    found = CompiledStep(model, on=False)
    with found.in_place():
        few_logits(model)
    assert not calls and not found.on


def broken(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C compiler\nwas found")

    return call


def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: doubled(function(*args, **kwargs))


def doubled(result: Any) -> Any:
    return tuple(2 * one for one in result) if isinstance(result, tuple) else 2 * result


def unmade(function: Callable[..., Any]) -> Callable[..., Any]:
    raise RuntimeError("torch.compile is not supported")


@pytest.mark.parametrize("failing", [broken, wrong, unmade])
def test_what_fails_is_told_once(
    failing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_step, "_compiled", failing)
    model = tiny_model("llama")
    expected, own = few_logits(model), rotary(model)
    with caplog.at_level(logging.WARNING):
        found = CompiledStep(model, on=True)
    assert not found.on and len(warnings(caplog)) == 1 and "uncompiled" in caplog.text
    with found.in_place():
        torch.testing.assert_close(few_logits(model), expected)
    assert rotary(model) is own


def test_what_fails_later_is_computed_by_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes that were not compiled before: the step goes on, unless memory is full."""
    errors: list[Exception] = []

    def later(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if errors:
                raise errors[0]
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(compiled_step, "_compiled", later)
    model = tiny_model("llama")
    expected, found = few_logits(model), CompiledStep(model, on=True)
    errors[:] = [torch.OutOfMemoryError("out of memory")]
    with pytest.raises(torch.OutOfMemoryError), found.in_place():
        few_logits(model)
    assert found.on
    errors[:] = [RuntimeError("recompile limit")]
    with caplog.at_level(logging.WARNING), found.in_place():
        torch.testing.assert_close(few_logits(model), expected)
    assert not found.on and len(warnings(caplog)) == 1
