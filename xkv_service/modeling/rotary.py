"""Rotary position embedding as plane rotations, inverted exactly and stored compactly.

Every RoPE variant that can be inverted turns pairs of head dimensions ("planes") by an angle that grows with
the position: `(x, y) -> (x cos - y sin, y cos + x sin)`, where cos and sin may carry a common scale (yarn,
longrope). Which dimensions pair up is a property of the modeling code and is probed (`rotary_probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from xkv_service.errors import UnsupportedModel
from xkv_service.kernels.probe import has_kernels

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _as_slice(dims: torch.Tensor) -> slice | torch.Tensor:
    """A slice when the dimensions are evenly spaced (views are much faster than gathers)."""
    values = dims.tolist()
    if len(values) == 1:
        return slice(values[0], values[0] + 1, 1)
    assert dims.device.type == "cpu", "planes stay on the CPU: reading them must not wait for a GPU"
    steps = {after - before for before, after in zip(values, values[1:], strict=False)}
    if len(steps) == 1 and (step := steps.pop()) > 0:
        return slice(values[0], values[-1] + 1, step)
    return dims


def rotate_planes(
    keys: torch.Tensor,
    planes: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn each plane of `keys` by its angle; dimensions outside every plane pass through.

    Args:
        keys: any float dtype [t, heads, D].
        planes: int64 [P, 2] on the CPU, dimension pairs that turn together.
        cos, sin: [t, P], scale included.
        out: any float dtype [t, heads, D] in memory of its own, to write to.

    Returns:
        `out`, or a new float32 tensor.
    """
    if out is None:
        out = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    if planes.shape[0] == 0:
        return out.copy_(keys)
    first, second = _as_slice(planes[:, 0]), _as_slice(planes[:, 1])
    if isinstance(first, slice) and isinstance(second, slice) and _has_kernel(keys, planes, first, second):
        from xkv_service.kernels.rotate import rotate

        rotate(keys, cos.float(), sin.float(), first, second, out)
        return out
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    x, y = keys[..., first].float(), keys[..., second].float()
    if 2 * planes.shape[0] < keys.shape[-1]:
        out.copy_(keys)
    out[..., first] = (x * cos).addcmul_(y, sin, value=-1)
    out[..., second] = (y * cos).addcmul_(x, sin)
    return out


def _has_kernel(keys: torch.Tensor, planes: torch.Tensor, first: slice, second: slice) -> bool:
    """Whether the kernel in `kernels/rotate.py` can turn these planes of these keys."""
    return (
        keys.shape[0] > 0
        and keys.stride(-1) == 1
        and 2 * planes.shape[0] == keys.shape[-1]
        and first.step == second.step
        and has_kernels(keys.device)
    )


def inverse(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and sin, float32 [t, P], that undo a rotation by `cos`, `sin` [t, P], whatever their scale."""
    cos, sin = cos.float(), sin.float()
    norm = (cos * cos + sin * sin).reciprocal()
    return cos * norm, -sin * norm


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """How one kind of layer is rotated at each position; the same in another process.

    Args:
        planes: int64 [P, 2] on the CPU: dimension pairs that turn together; P = 0 means no rotation (NoPE).
        inv_freq: float32 [P], angle per position, or None when only the recorded tables reproduce it.
        scaling: common scale of cos and sin.
        rounding: dtype the model rounds cos and sin to before use.
        cos, sin: [T, P] recorded tables, or None when `inv_freq` reproduces them.
    """

    planes: torch.Tensor
    inv_freq: torch.Tensor | None = None
    scaling: float = 1.0
    rounding: torch.dtype = torch.float32
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [t, P], at int64 positions [t].

        Raises:
            UnsupportedModel: a position past the recorded tables.
        """
        if self.planes.shape[0] == 0:
            empty = torch.empty(positions.shape[0], 0, device=positions.device)
            return empty, empty
        if self.inv_freq is None:
            return self._recorded(positions)
        angles = positions[:, None].float() * self.inv_freq.to(positions.device)
        cos = (angles.cos() * self.scaling).to(self.rounding)
        return cos.float(), (angles.sin() * self.scaling).to(self.rounding).float()

    def _recorded(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.cos is not None and self.sin is not None
        if positions.numel() and int(positions.max()) >= self.cos.shape[0]:
            raise UnsupportedModel(
                f"this model's rotary embedding is known for {self.cos.shape[0]} positions only",
                hint="its angles follow no formula known here, so a prefix cannot be moved past them",
            )
        positions = positions.to(self.cos.device)
        return self.cos[positions].float(), self.sin[positions].float()

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys before RoPE [t, heads, D] -> rotated for positions [t], float32."""
        return rotate_planes(keys, self.planes, *self.cos_sin(positions))

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cached keys [t, heads, D] at positions [t] -> keys before RoPE, float32."""
        return rotate_planes(keys, self.planes, *inverse(*self.cos_sin(positions)))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """CPU tensors, names without prefix: planes int32 [P, 2], scaling and rounding [1], and where
        they are known inv_freq [P], cos and sin [T, P]."""
        tensors = {
            "planes": self.planes.to("cpu", torch.int32),
            "scaling": torch.tensor([self.scaling], dtype=torch.float64),
            "rounding": torch.tensor([_DTYPE_CODES[self.rounding]], dtype=torch.int32),
        }
        for name in ("inv_freq", "cos", "sin"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value.cpu().contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> RotaryTable:
        """The table `to_tensors` was called on, with its names and shapes, on the CPU."""
        codes = {code: dtype for dtype, code in _DTYPE_CODES.items()}
        return cls(
            planes=tensors["planes"].long(),
            inv_freq=tensors.get("inv_freq"),
            scaling=float(tensors["scaling"][0]),
            rounding=codes[int(tensors["rounding"][0])],
            cos=tensors.get("cos"),
            sin=tensors.get("sin"),
        )

    def to(self, device: torch.device | str) -> RotaryTable:
        """The same table with its angles on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in ("inv_freq", "cos", "sin")
            if (value := getattr(self, name)) is not None
        }
        return RotaryTable(self.planes, scaling=self.scaling, rounding=self.rounding, **moved)
