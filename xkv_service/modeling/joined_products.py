"""Joined products: linear modules of one input, such as queries, keys and values, are multiplied at once.

A small batch is bound by reading weights, and one large matrix is read faster than three small ones. The
model keeps its code, its modules and its weights: these become views of one tensor. Whichever module of a
group is called first computes the product of all; the others give their parts of it where they are called
with the very same input, and else compute their own. So calls come out right in any order and with any input.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from xkv_service.modeling.observation import switching

_log = logging.getLogger(__name__)
_PROBE = 4
"""Tokens of the forwards that show which modules have one input, and whether the model comes out the same."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Of the largest logit, between joined and separate products: as between packed and separate runs."""
_THREAD = threading.local()
"""What was made last on this thread: prefixes are loaded by others, which run the model, too."""


@dataclass(frozen=True, eq=False)
class _Made:
    """A product whose parts are waited for.

    Args:
        joint: whose. source: its input, which is not kept alive; the parts go with it.
        versions: of input, weights and biases: changed in place, they have others.
        parts: by place; those that were taken are gone.
    """

    joint: Joint
    source: weakref.ref[torch.Tensor]
    versions: list[int]
    parts: dict[int, torch.Tensor]


@dataclass(eq=False)
class Joint:
    """Weights of several linear modules in one tensor.

    Args:
        parameters: of the modules: weights, then biases if they have any. They are views of what follows.
        weight: [sum of output features, input features]. bias: [sum of output features] or None.
        sizes: output features of each module.
    """

    parameters: tuple[torch.Tensor, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: list[int]
    _places: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._places = [one.data_ptr() for one in self.parameters]

    @property
    def biases(self) -> tuple[torch.Tensor, ...]:
        """Of the modules, or none."""
        return self.parameters[len(self.sizes) :]

    def whole(self) -> bool:
        """Whether the modules' parameters still are views of the joint tensor: `to` moves them apart."""
        return [one.data_ptr() for one in self.parameters] == self._places

    def part(self, place: int, states: torch.Tensor) -> torch.Tensor | None:
        """Part `place` of the product of `states` [..., input features], or None: it cannot be joined."""
        # Inference tensors do not tell whether they were changed; gradients go to each weight.
        if torch.is_grad_enabled() or states.is_inference() or not self.whole():
            return None
        versions = [states._version, *(one._version for one in self.parameters)]
        made: _Made | None = getattr(_THREAD, "made", None)
        if made is None or made.joint is not self or made.source() is not states or made.versions != versions:
            made = None
        if made is None or place not in made.parts:
            product = linear(states, self.weight, self.bias)
            parts = dict(enumerate(torch.split(product, self.sizes, -1)))
            made = _Made(self, weakref.ref(states, lambda _: parts.clear()), versions, parts)
        found = made.parts.pop(place)
        _THREAD.made = made if made.parts else None
        return found


class JoinedLinear(nn.Linear):
    """A linear module of a model whose products are joined.

    Attributes:
        joint: that its weight belongs to, at `place`.
    """

    joint: Joint
    place: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear.forward`."""
        found = self.joint.part(self.place, input) if self._is_joined() else None
        return super().forward(input) if found is None else found

    def _is_joined(self) -> bool:
        """Whether nobody gave it other parameters."""
        joint, biases = self.joint, self.joint.biases
        bias = biases[self.place] if biases else None
        return joint.parameters[self.place] is self.weight and bias is self.bias


def join_products(model: PreTrainedModel) -> int:
    """Join the products of modules that have one input and one parent; runs the model twice over few tokens.

    Left alone are modules with hooks, with weights that others share, that are no plain `nn.Linear`, or that
    do not run in the probe (most experts). Weights are copied, a group at a time: do not join where they are
    mapped from a file that many processes share.

    Whatever fails, memory for a group's weights or the model's code, is logged once; all products that this
    call joined are separate then.

    Args:
        model: that nobody else runs meanwhile. What was joined before stays so.

    Returns:
        Groups that were joined.
    """
    joined: list[list[nn.Linear]] = []
    with switching(model), torch.no_grad():
        try:
            before, groups = _probe(model)
            for group in groups:
                _join(group)
                joined.append(group)
            if groups:
                _compare(model, before)
        except Exception as error:  # noqa: BLE001 - of the model's code, or no memory for a group's weights
            _log.warning("products stay separate: %s", str(error).strip().split("\n")[0])
            for group in joined:
                _part(group)
            return 0
    return len(joined)


def _probe(model: PreTrainedModel) -> tuple[torch.Tensor, list[list[nn.Linear]]]:
    """Logits of a few tokens, and groups of modules that were called once each with one input."""
    shared = _shared_storages(model)
    calls: dict[nn.Linear, list[Any]] = {}
    parents = {
        child: parent
        for parent in model.modules()
        for child in parent.children()
        if _joinable(child, shared) and isinstance(child, nn.Linear)
    }
    handles = [
        one.register_forward_pre_hook(lambda module, args: calls.setdefault(module, []).append(_seen(args)))
        for one in parents
    ]
    try:
        logits = few_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[Any, ...], list[nn.Linear]] = {}
    for one, seen in calls.items():
        if len(seen) == 1 and seen[0] is not None:
            states, version = seen[0]  # `calls` keeps the input alive, so nobody else has its id
            name = (parents[one], id(states), version, one.weight.dtype, one.weight.device, one.bias is None)
            groups.setdefault(name, []).append(one)
    return logits, [group for group in groups.values() if len(group) > 1]


def _seen(args: tuple[Any, ...]) -> tuple[torch.Tensor, int] | None:
    if len(args) == 1 and type(args[0]) is torch.Tensor and not args[0].is_inference():
        return args[0], args[0]._version
    return None


def _shared_storages(model: PreTrainedModel) -> set[int]:
    """Addresses of storages of several parameters or buffers: tied weights, and what was joined."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for one in (*module._parameters.values(), *module._buffers.values()):
            if one is not None:
                address = one.untyped_storage().data_ptr()
                (shared if address in seen else seen).add(address)
    return shared


def _joinable(module: nn.Module, shared: set[int]) -> bool:
    """Whether a module is a plain linear one whose weights are its own."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    own = [one for one in (module.weight, module.bias) if one is not None]
    return all(
        type(one) is nn.Parameter
        and not one.is_inference()
        and one.untyped_storage().data_ptr() not in shared
        for one in own
    )


def _join(group: list[nn.Linear]) -> None:
    sizes = [one.out_features for one in group]
    weights, biases = [one.weight for one in group], [one.bias for one in group if one.bias is not None]
    weight = _laid_together(weights, sizes)
    bias = _laid_together(biases, sizes) if biases else None
    joint = Joint((*weights, *biases), weight, bias, sizes)
    for place, one in enumerate(group):
        one.__class__ = JoinedLinear
        assert isinstance(one, JoinedLinear)
        one.joint, one.place = joint, place
    if weight.device.type == "cuda":
        torch.cuda.empty_cache()  # of the weights as they were: no larger one would fit where they lay


def _laid_together(parameters: Sequence[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """The parameters along their first dimension; they become views of it."""
    joint = torch.cat([one.detach() for one in parameters])
    for one, view in zip(parameters, torch.split(joint, sizes), strict=True):
        one.data = view
    return joint


def _part(group: list[nn.Linear]) -> None:
    """Products are separate again; weights stay where they are."""
    for one in group:
        del one.joint, one.place
        one.__class__ = nn.Linear


def _compare(model: PreTrainedModel, before: torch.Tensor) -> None:
    """The model must still make these logits: its code might need parts that lie together."""
    worst = difference(before, few_logits(model))
    if not worst <= tolerance(model.dtype):  # nor nan
        raise ArithmeticError(f"logits differ by {worst:.3g} with joined ones")


def few_logits(model: PreTrainedModel, tokens: int = _PROBE) -> torch.Tensor:
    """Logits of a forward without a cache over a few tokens: float32 [1, tokens, vocabulary]."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.arange(1, 1 + tokens, device=model.device)[None] % vocabulary
    out: Any = model(input_ids=ids, use_cache=False)
    logits: torch.Tensor = out.logits.float()
    return logits


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest between two tensors of logits, as a part of the largest logit before."""
    return float((after - before).abs().amax() / before.abs().amax().clamp_min(1e-6))


def tolerance(dtype: torch.dtype) -> float:
    """The `difference` that rounding may make in a model of this dtype."""
    return _TOLERANCE.get(dtype, 1e-3)
