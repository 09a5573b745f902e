"""Find out, by calling an attention module, which key dimensions RoPE turns and with which cos and sin.

The module is called once on a batch whose rows differ only in the cos and sin they are given: all rows keep
the same hidden states, so the keys that reach the cache show what RoPE does, whatever code does it. With cos
and sin made of zeros and ones every product is exact, in bf16 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.rotary import inverse, rotate_planes

PositionEmbeddings = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, eq=False)
class RotaryForm:
    """How one attention module applies the model's `position_embeddings` to its keys.

    Args:
        planes: int64 [P, 2] on the CPU: dimension pairs that turn together; P = 0 for keys that do not turn.
        cos_columns, sin_columns: int64 [P], the column of the model's cos and sin that turns each plane.
    """

    planes: torch.Tensor
    cos_columns: torch.Tensor
    sin_columns: torch.Tensor

    @property
    def signature(self) -> tuple[int, ...]:
        """Equal for forms that turn the same planes by the same columns of cos and sin."""
        return tuple(torch.cat([self.planes.flatten(), self.cos_columns, self.sin_columns]).tolist())

    def plane_tables(self, embeddings: PositionEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's cos and sin [..., columns] (or complex) as [..., P], in the model's dtype."""
        cos, sin = split_cos_sin(embeddings)
        device = cos.device
        return cos[..., self.cos_columns.to(device)], sin[..., self.sin_columns.to(device)]

    def rotate(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Keys before RoPE [t, heads, D], cos and sin [t, P] -> float32 rotated keys."""
        return rotate_planes(keys, self.planes, cos, sin)

    def unrotate(
        self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotated keys [t, heads, D], cos and sin [t, P] -> float32 keys before RoPE."""
        return rotate_planes(keys, self.planes, *inverse(cos, sin), out)


def split_cos_sin(embeddings: PositionEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a model's `position_embeddings`: a pair of tensors or one complex tensor."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings.real, embeddings.imag
    cos, sin = embeddings
    return cos, sin


def probe_rotary_form(module: nn.Module, arguments: dict[str, Any]) -> RotaryForm:
    """The rotary form of one attention module.

    Args:
        module: an attention module with `layer_idx`, called with a `position_embeddings` argument or without.
        arguments: the arguments by name of an earlier call of it, batch of one.

    Raises:
        UnsupportedModel: its keys are not those of plane rotations by `position_embeddings`.
    """
    embeddings = arguments.get("position_embeddings")
    if embeddings is None:
        return _form_without_embeddings(module, arguments)
    columns = split_cos_sin(embeddings)[0].shape[-1]
    keys = _keys_of(module, arguments, _marker_rows(embeddings, columns)).cpu()
    plain, turned, real = keys[0], keys[1], keys[-1]
    if torch.equal(plain, real) and torch.equal(plain, turned):
        _refuse_unless(_ignores_position(module, arguments), module, "rotates keys by itself")
        return no_rotation()
    bits = _bit_count(columns)
    planes, signs_fit = _find_planes(plain, turned)
    _refuse_unless(signs_fit, module, "does not turn key dimensions in pairs")
    form = RotaryForm(
        planes,
        _columns(keys[2 : 2 + bits], plain, planes[:, 0], planes[:, 0]),
        _columns(keys[2 + bits : 2 + 2 * bits], plain, planes[:, 0], planes[:, 1]),
    )
    _refuse_unless(_explains(form, plain, real, embeddings), module, "does more to keys than rotate them")
    return form


def no_rotation() -> RotaryForm:
    """The form of keys that do not turn."""
    empty = torch.empty(0, dtype=torch.int64)
    return RotaryForm(empty.reshape(0, 2), empty, empty)


def _form_without_embeddings(module: nn.Module, arguments: dict[str, Any]) -> RotaryForm:
    _refuse_unless(_ignores_position(module, arguments), module, "rotates keys by itself")
    return no_rotation()


def _refuse_unless(condition: bool, module: nn.Module, what: str) -> None:
    if not condition:
        raise UnsupportedModel(
            f"the rotary embedding of layer {module.layer_idx} cannot be inverted: "
            f"{type(module).__name__} {what}",
            hint="use a model that rotates keys last, right before caching them",
        )


def _bit_count(columns: int) -> int:
    return max(1, (columns - 1).bit_length())


def _marker_rows(embeddings: PositionEmbeddings, columns: int) -> PositionEmbeddings:
    """One batch row per question: no rotation, a quarter turn, each bit of the column numbers for cos and for
    sin, and last the model's real embeddings."""
    cos, sin = split_cos_sin(embeddings)
    tokens, device = cos.shape[-2], cos.device
    number = torch.arange(columns, device=device)
    bits = torch.stack([(number >> bit) & 1 for bit in range(_bit_count(columns))]).to(cos.dtype)
    zeros, ones = torch.zeros(1, columns, device=device), torch.ones(1, columns, device=device)
    zero_bits = torch.zeros_like(bits)
    rows_cos = torch.cat([ones, zeros, bits, zero_bits]).to(cos.dtype)
    rows_sin = torch.cat([zeros, ones, zero_bits, bits]).to(sin.dtype)
    marked_cos = torch.cat([rows_cos[:, None].expand(-1, tokens, -1), cos[:1]])
    marked_sin = torch.cat([rows_sin[:, None].expand(-1, tokens, -1), sin[:1]])
    if isinstance(embeddings, torch.Tensor):
        return torch.complex(marked_cos, marked_sin)
    return marked_cos, marked_sin


def _keys_of(
    module: nn.Module, arguments: dict[str, Any], embeddings: PositionEmbeddings | None, repeat: bool = False
) -> torch.Tensor:
    """Keys [rows, t * heads, D] that the module caches for the same hidden states under each row."""
    hidden = arguments["hidden_states"][:1]
    if repeat:
        hidden = hidden[:, :1].expand_as(hidden).contiguous()
    call = dict(arguments)
    if embeddings is not None:
        call["position_embeddings"] = embeddings
        hidden = hidden.expand(split_cos_sin(embeddings)[0].shape[0], -1, -1)
    cache = DynamicCache()
    # The cache's argument has a name of its own in some families (gpt_neox: `layer_past`).
    call.update({name: cache for name, value in arguments.items() if isinstance(value, Cache)})
    call.update(hidden_states=hidden, attention_mask=None)
    with torch.inference_mode():
        module(**call)
    keys = cache.layers[module.layer_idx].keys
    assert keys is not None
    flat: torch.Tensor = keys.transpose(1, 2).flatten(1, 2)
    return flat


def _ignores_position(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether one token repeated gets the same key at every position."""
    keys = _keys_of(module, arguments, None, repeat=True)[0]
    tokens = arguments["hidden_states"].shape[1]
    keys = keys.reshape(tokens, -1).float()
    scale = keys.abs().amax().clamp_min(1e-30)
    return bool(((keys - keys[:1]).abs().amax() / scale) < 1e-5)


def _find_planes(plain: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Planes [P, 2] from keys [n, D] without rotation and after a quarter turn ((x, y) -> (-y, x))."""
    plain, turned = plain.double(), turned.double()
    scale = plain.abs().amax().clamp_min(1e-30)
    negated = _matches(turned, -plain, scale)
    kept = (turned == plain).all(0)
    negated[kept] = False
    first = negated.any(1).nonzero()[:, 0]
    second = negated.int().argmax(1)[first]
    planes = torch.stack([first, second], 1)
    turned_back = torch.equal(turned[:, second], plain[:, first])
    one_each = bool((negated.sum(1) <= 1).all()) and 2 * len(first) + int(kept.sum()) == plain.shape[1]
    return planes, turned_back and one_each


def _matches(turned: torch.Tensor, plain: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bool [D, D]: whether dimension i of `turned` equals dimension j of `plain` in every sample."""
    distance = (turned[:, :, None] - plain[:, None, :]).abs().amax(0)
    return distance <= 1e-6 * scale


def _columns(
    rows: torch.Tensor, plain: torch.Tensor, out: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    """Column numbers [P] spelled in bits by `rows` [bits, n, D], where `out` is 0 or +- `source`."""
    largest = plain[:, source].abs().argmax(0)
    spelled = rows[:, largest, out] != 0
    weights = 2 ** torch.arange(rows.shape[0], device=rows.device)
    return (spelled.long() * weights[:, None]).sum(0)


def _explains(
    form: RotaryForm, plain: torch.Tensor, real: torch.Tensor, embeddings: PositionEmbeddings
) -> bool:
    """Whether un-rotating the really rotated keys gives the keys without rotation."""
    cos, sin = form.plane_tables(embeddings)
    tokens = cos.shape[-2]
    shape = (tokens, plain.shape[0] // tokens, plain.shape[1])
    found = form.unrotate(real.reshape(shape), cos[0].cpu(), sin[0].cpu())
    expected = plain.reshape(shape).float()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    return bool(error < _TOLERANCE.get(plain.dtype, 1e-4))
