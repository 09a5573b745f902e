"""Methods by name: options are read, checked and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from xkv_service.demo import demo_calibration_path, demo_model_path
from xkv_service.errors import InvalidSpec, ModelMismatch, RatioUnreachable
from xkv_service.evaluation.methods.registry import METHODS, make_method, make_methods
from xkv_service.evaluation.methods.xkv import XKV
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill


@pytest.fixture(scope="module")
def exact(bundled: LoadedModel) -> Prefill:
    ids = torch.randint(10, 2000, (512,), generator=torch.Generator().manual_seed(0))
    return prefill(bundled.model, ids)


def test_options_become_arguments() -> None:
    method = make_method("xkv:group=2,ratio=16.5,index=none,key_weights=query")
    assert isinstance(method, XKV)
    assert (method.spec.group_size, method.spec.ratio, method.spec.index) == (2, 16.5, "none")
    assert method.spec.key_weights == "query" and method.selection is None


def test_the_index_is_that_of_artifacts() -> None:
    for text, index in (("ratio=8", "sketch"), ("ratio=9", "derived"), ("ratio=9,index=sketch", "sketch")):
        method = make_method(f"xkv:selector=sketch,{text}")
        assert isinstance(method, XKV) and method.spec.index == index


def test_a_budget_is_tokens_or_a_share() -> None:
    for text, budget in (("256", 256), ("0.125", 0.125)):
        method = make_method(f"xkv:selector=sketch,budget={text}")
        assert isinstance(method, XKV) and method.selection is not None
        assert method.selection.budget == budget and type(method.selection.budget) is type(budget)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_its_name_and_defaults(name: str) -> None:
    assert make_method(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svd", "'svd' is unknown"),
        ("xkv:rank=3", "'rank=3' is not an option"),
        ("xkv:ratio", "'ratio' is not an option"),
        ("xkv:ratio=8,ratio=4", "'ratio=4' is not an option"),
        ("xkv:ratio=many", "'many' is no value of ratio"),
        ("xkv:index=tree", "'tree' is no value of index"),
        ("xkv:group=0", "group_size=0 is out of range"),
        ("xkv:budget=64", "nothing is selected"),
        ("xkv:last=64", "nothing is selected"),
        ("xkv:selector=landmark", "needs its index"),
        ("full:x=1", "'x=1' is not an option"),
    ],
)
def test_wrong_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        make_method(text)


def test_a_method_is_named_once() -> None:
    with pytest.raises(InvalidSpec, match="twice"):
        make_methods(["xkv", "full", "xkv"])


@pytest.mark.parametrize("text", ["xkv:ratio=4", "xkv:ratio=4,selector=exact,budget=64", "full"])
def test_caches_of_one_prefix_do_not_disturb_each_other(
    bundled: LoadedModel, exact: Prefill, text: str
) -> None:
    from xkv_service.decoding.xkv_attention import enable_xkv

    before = exact.rotated_keys(0).clone()
    prepared = make_method(text).prepare(bundled.model, exact)
    assert prepared.tokens == 512

    def after(*ids: int) -> torch.Tensor:
        cache = prepared.cache()
        with enable_xkv(bundled.model), torch.no_grad():
            for token in ids:
                output = bundled.model(torch.tensor([[token]]), past_key_values=cache)
        return output.logits[0, -1]

    first = after(11, 12)
    after(13, 14, 15)
    assert torch.equal(after(11, 12), first)
    assert torch.equal(exact.rotated_keys(0), before)


def test_everything_stored_is_counted(bundled: LoadedModel, exact: Prefill) -> None:
    full = make_method("full").prepare(bundled.model, exact).nbytes
    assert full == 512 * 6144
    for index in ("none", "sketch"):
        prepared = XKV(ratio=6.0, index=index).prepare(bundled.model, exact)
        tensors = prepared.factors.nbytes
        assert tensors < prepared.nbytes < tensors + 25_000  # the header
        assert full / prepared.nbytes == pytest.approx(6.0, rel=0.03)


def test_a_ratio_out_of_reach_is_told(bundled: LoadedModel, exact: Prefill) -> None:
    with pytest.raises(RatioUnreachable):
        XKV(ratio=300.0).prepare(bundled.model, exact)


def test_another_models_calibration_is_refused(bundled: LoadedModel, tmp_path: Path) -> None:
    own = XKV(ratio=6.0, calibration=str(demo_calibration_path()), index="none", factors="int8")
    ids = torch.randint(10, 2000, (256,), generator=torch.Generator().manual_seed(0))
    assert own.prepare(bundled.model, prefill(bundled.model, ids)).tokens == 256
    other = tmp_path / "other"
    shutil.copytree(demo_model_path(), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    model = load_model(other, device="cpu").model
    with pytest.raises(ModelMismatch, match=r"was made for .* \(float32, .*\), not for other \(float32"):
        own.prepare(model, prefill(model, ids))
    model = load_model(demo_model_path(), device="cpu", dtype="bfloat16").model
    with pytest.raises(ModelMismatch, match=r"it is of another dtype \(float32, not bfloat16\)"):
        own.prepare(model, prefill(model, ids))


def test_methods_that_differ_in_selection_share_factors(bundled: LoadedModel, exact: Prefill) -> None:
    first = XKV(ratio=4.0).prepare(bundled.model, exact)
    second = XKV(ratio=4.0, selector="sketch", budget=32).prepare(bundled.model, exact)
    assert first.factors is second.factors
    assert XKV(ratio=5.0).prepare(bundled.model, exact).factors is not first.factors
