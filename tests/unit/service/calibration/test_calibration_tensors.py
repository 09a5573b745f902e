"""Calibrations as tensors and back, every way a file can lie about them, and models they are not for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from calibration_samples import GROUPS, calibration
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import shared
from transformers import PreTrainedModel

from xkv_artifacts.errors import CorruptArtifact
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.moments import Moments
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.inspect import inspect_loaded

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]


def put(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


BAD: dict[str, tuple[str, Change | None]] = {
    "no bases": ("group.0.key.bases", None),
    "bases of another width": ("group.0.key.bases", lambda t: t[:, :-1]),
    "bases of 16 bits": ("group.1.value.bases", lambda t: t.half()),
    "bases that are no number": ("group.1.value.bases", lambda t: put(t, (2, 3), torch.nan)),
    "no directions": ("group.1.value.bases", lambda t: t[:0]),
    "more directions than features": ("group.0.key.bases", lambda t: torch.cat([t, t])),
    "too few energies": ("group.0.key.energies", lambda t: t[:-1]),
    "a negative energy": ("group.0.key.energies", lambda t: put(t, (7,), -1e-6)),
    "an infinite energy": ("group.0.key.energies", lambda t: put(t, (0,), torch.inf)),
    "energies out of order": ("group.0.key.energies", lambda t: t.flip(0)),
    "no metric": ("layer.2.key.metric", None),
    "a metric that is not square": ("layer.2.key.metric", lambda t: t[:, :-1]),
    "a metric of no heads": ("layer.2.key.metric", lambda t: t[:0]),
    "a singular metric": ("layer.2.key.metric", lambda t: put(t, (0, 1, 1), 0.0)),
    "a metric of negative worth": ("layer.2.value.metric", lambda t: -t),
    "an uneven metric": ("layer.2.value.metric", lambda t: put(t, (0, 0, 1), 0.5)),
    "no planes": ("layer.3.planes", None),
    "planes outside the head": ("layer.3.planes", lambda t: put(t, (0, 0, 0), 4)),
    "planes before the head": ("layer.3.planes", lambda t: put(t, (0, 0, 0), -1)),
    "too few planes": ("layer.3.planes", lambda t: t[:, :1]),
    "planes of another head": ("layer.3.planes", lambda t: torch.cat([t, t])),
    "an unknown tensor": ("layer.9.planes", lambda t: torch.zeros(1)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_tensor_that_is_not_what_it_must_be_is_refused_by_name(case: str) -> None:
    name, change = BAD[case]
    _, tensors = calibration()
    Calibration.from_tensors(GROUPS, tensors, {}, "")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name, torch.empty(0)))
    with pytest.raises(CorruptArtifact, match=name):
        Calibration.from_tensors(GROUPS, tensors, {}, "")


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_random_damage_never_ends_in_another_error(data: st.DataObject) -> None:
    _, tensors = calibration()
    name = data.draw(st.sampled_from(sorted(tensors)))
    found = tensors[name]
    place = data.draw(st.integers(0, found.numel() - 1))
    value = data.draw(st.sampled_from([0, -1, 1, 5, 1e30, -1e30, float("nan"), float("inf")]))
    if found.dtype == torch.int16:
        value = max(-(2**15), min(2**15 - 1, int(value))) if abs(value) < 1e30 else -(2**15)
    tensors[name] = put(found.flatten(), (place,), value).reshape(found.shape)
    with suppress(CorruptArtifact):
        Calibration.from_tensors(GROUPS, tensors, {}, "")


def test_another_models_layers_are_refused(model: PreTrainedModel, moments: Moments) -> None:
    made = shared(moments, [(0, 2), (2, 1)])
    layout = inspect_loaded(model).layout
    groups = made.layer_groups(layout)
    assert [[layer.index for layer in group] for group in groups] == [[0, 1], [2]]
    for other in (
        tiny_model("llama", num_hidden_layers=2),
        tiny_model("llama", num_hidden_layers=4),
        tiny_model("llama", num_key_value_heads=4),
        tiny_model("llama", head_dim=8),
        tiny_model("gemma2"),
    ):
        with pytest.raises(InvalidSpec, match="of this very model|other shapes or numbers"):
            made.layer_groups(inspect_loaded(other).layout)
    with pytest.raises(InvalidSpec, match="other shapes or numbers"):
        replace(made, groups=made.groups[::-1]).layer_groups(layout)
