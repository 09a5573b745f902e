"""Transformers' quantized layers, filled with an exact prefix."""

from __future__ import annotations

import pytest
import torch
from prefixes import FAMILIES, TOKENS, check_prepared, exact_logits, exact_prefix, logits_on

from xkv_service.errors import InvalidSpec, MissingExtra
from xkv_service.evaluation.methods import quantized
from xkv_service.evaluation.methods.quantized import Quantized
from xkv_service.evaluation.methods.registry import make_method

COUNT = TOKENS // 4 * 4  # packing takes tokens in fours


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ["bits=4", "bits=2,residual=16", "bits=8,backend=fp8"])
def test_a_quantized_prefix_serves_a_chat(family: str, options: str) -> None:
    check_prepared(make_method(f"quantized:{options}"), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_nearly_exact(family: str) -> None:
    model, exact = exact_prefix(family)
    logits = logits_on(model, Quantized(bits=8).prepare(model, exact).cache())
    wanted = exact_logits(model, exact)
    assert (logits - wanted).abs().max() < 0.02 * wanted.std()
    coarse = logits_on(model, Quantized(bits=2).prepare(model, exact).cache())
    assert (coarse - wanted).abs().max() > 0.2 * wanted.std()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_off_by_about_half_a_step(bits: int) -> None:
    model, exact = exact_prefix()
    layers = Quantized(bits=bits).prepare(model, exact).cache().layers
    for index in range(6):
        keys = exact.rotated_keys(index).transpose(0, 1)
        steps = (keys.amax(-1) - keys.amin(-1)) / (2**bits - 1)  # groups are a head's 16 numbers of a token
        worst = (layers[index].keys[0] - keys).abs().amax(-1)
        assert (worst[:, :COUNT] < 1.2 * steps[:, :COUNT]).all()
        assert torch.equal(worst[:, COUNT:], torch.zeros(2, TOKENS - COUNT))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_the_packed_tensors(bits: int) -> None:
    model, exact = exact_prefix()
    numbers, groups, exact_tokens = COUNT * 32, COUNT * 2, TOKENS - COUNT
    side = numbers * bits // 8 + groups * (2 + 2) + exact_tokens * 32 * 2
    assert Quantized(bits=bits).prepare(model, exact).nbytes == 6 * 2 * side
    residual = Quantized(bits=bits, residual=TOKENS).prepare(model, exact)
    assert residual.nbytes == exact.layout.bytes_full(TOKENS)
    torch.testing.assert_close(logits_on(model, residual.cache()), exact_logits(model, exact))


def test_bytes_of_floating_point() -> None:
    model, exact = exact_prefix()
    prepared = Quantized(bits=8, backend="fp8").prepare(model, exact)
    assert prepared.nbytes == 6 * 2 * (COUNT * 32 + 4 + (TOKENS - COUNT) * 32 * 2)


def test_without_hqq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**options: object) -> None:
        raise ImportError("You need to install HQQ")

    monkeypatch.setattr(quantized, "HQQQuantizedLayer", missing)
    with pytest.raises(MissingExtra) as error:
        Quantized(bits=4)
    assert "xkv-service[quantized]" in error.value.hint
    Quantized(bits=8, backend="fp8")


def test_options_are_checked() -> None:
    for bad in ("bits=3", "bits=4,backend=fp8", "backend=other", "group=0", "residual=-1"):
        with pytest.raises(InvalidSpec):
            make_method(f"quantized:{bad}")
