"""Kernels run where one of them passed its trial; elsewhere PyTorch does the same.

Here the CPU stands in for a GPU, and functions for kernels: one that does not compile raises as Triton does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import calibrated

from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.decoding import kernel_choice
from xkv_service.factorization.quantize import quantize_columns, round_plainly
from xkv_service.kernels import probe
from xkv_service.kernels.probe import passes
from xkv_service.modeling.rotary import rotate_planes
from xkv_service.selection import layer_index
from xkv_service.selection.sketch import encode, encode_plainly

HERE = torch.device("cpu")
KERNELS = ("rotate", "encode_sketch", "round_columns")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, Callable[..., Any]]) -> None:
    """The CPU counts as a GPU that has been tried never, with these functions in place of its kernels."""
    monkeypatch.setattr(probe, "DEVICES", ("cpu",))
    monkeypatch.setattr(probe, "_KNOWN", {})
    for name, kernel in kernels.items():
        monkeypatch.setitem(sys.modules, f"xkv_service.kernels.{name}", SimpleNamespace(**{name: kernel}))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No kernel compiles; the names of those that were called."""
    called: list[str] = []

    def failing(name: str) -> Callable[..., None]:
        def fail(*_: object) -> None:
            called.append(name)
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

        return fail

    on_a_gpu(monkeypatch, {name: failing(name) for name in KERNELS})
    return called


def compressed(calibration: Calibration | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All tensors of a prefix, and the logits of a question behind it."""
    model, spec = tiny_model("llama"), CompressionSpec(rank_k=24, rank_v=40, factor_dtype="int8")
    if calibration is not None:
        spec = CompressionSpec(
            calibration=calibration.id, ratio=2.0, basis="calibrated", factor_dtype="mixed", index="derived"
        )
    factors = compress(model, random_ids(120), spec, calibration)
    with torch.no_grad(), enable_xkv(model):
        cache = XKVCache.from_factors(model, factors)
        return factors.to_tensors(), model(random_ids(3, seed=1)[None], past_key_values=cache).logits


@pytest.mark.parametrize("derived", [False, True])
def test_pytorch_compresses_and_decodes_where_no_kernel_compiles(
    derived: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = calibrated(tiny_model("llama")) if derived else None
    tensors, logits = compressed(calibration)
    called = request.getfixturevalue("no_compiler")
    found, answered = compressed(calibration)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(answered, logits)
    assert called == ["round_columns"], "it is tried once"
    assert [record.message for record in caplog.records if "C compiler" in record.message]


def test_the_index_of_a_long_prefix_is_made_in_pieces_by_pytorch(
    no_compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_index, "_CHUNK", 50)
    sizes: list[int] = []
    monkeypatch.setattr(
        layer_index, "encode", lambda keys, planes: sizes.append(len(keys)) or encode_plainly(keys, planes)
    )
    compressed(None)
    assert set(sizes) == {50, 20}


def test_kernels_that_pass_are_used_whatever_a_decode_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def rotate(keys: torch.Tensor, *given: Any) -> None:
        called.append("rotate")
        given[-1].copy_(keys)

    def encode_sketch(keys: torch.Tensor, planes: torch.Tensor, *_: int) -> tuple[torch.Tensor, torch.Tensor]:
        called.append("encode_sketch")
        return encode_plainly(keys, planes)

    def round_columns(factors: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
        called.append("round_columns")
        return (factors / scales).round().clamp(-levels, levels).to(torch.int8)

    on_a_gpu(monkeypatch, {one.__name__: one for one in (rotate, encode_sketch, round_columns)})
    monkeypatch.setattr(kernel_choice, "DEVICES", ())
    keys, planes = torch.randn(9, 2, 4), torch.tensor([[0, 2], [1, 3]])
    rotate_planes(keys, planes, torch.ones(9, 2), torch.zeros(9, 2))
    encode(keys, planes.to(torch.int16).expand(2, -1, -1))
    integers, scales = quantize_columns(keys.flatten(1), slice(None))
    assert called == ["round_columns", "rotate", "encode_sketch", "round_columns"], "the first is the trial"
    assert torch.equal(integers, round_plainly(keys.flatten(1), scales))


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, {"round_columns": lambda factors, *_: torch.ones_like(factors)})
    assert not probe.has_kernels(HERE)
    assert not passes(lambda device: float("nan"), HERE)


def trial_of(*errors: Exception) -> tuple[Callable[[torch.device], float], list[torch.device]]:
    """A trial that raises these, one a call, and passes then; and the devices of its calls."""
    left, asked = list(errors), []

    def trial(device: torch.device) -> float:
        asked.append(device)
        if left:
            raise left.pop(0)
        return 0.0

    return trial, asked


def test_a_device_whose_memory_was_full_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a decode step asks, of a GPU."""
    trial, asked = trial_of(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    )
    device = torch.device("cuda", 0)
    monkeypatch.setattr(kernel_choice, "DEVICES", ("cuda",))
    for name, stand_in in (
        ("_has_triton", lambda: True),
        ("_is_able", lambda device: True),
        ("try_attention", trial),
    ):
        monkeypatch.setattr(kernel_choice, name, stand_in)
    assert [kernel_choice.kernels_run(device) for _ in range(4)] == [False, False, True, True]
    assert asked == [device] * 3


def test_any_other_failure_is_for_good() -> None:
    trial, asked = trial_of(RuntimeError("Failed to find C compiler"))
    assert [passes(trial, HERE) for _ in range(3)] == [False] * 3
    assert len(asked) == 1
