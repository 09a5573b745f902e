"""`PrefixFactors`: a compressed prefix, everything that decoding from it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from xkv_artifacts.manifest import Fidelity, GroupLayout, PrefixManifest, WindowLayout
from xkv_service.modeling.linear_state import LayerState
from xkv_service.modeling.rotary import RotaryTable
from xkv_service.packed_factors import PackedFactors
from xkv_service.selection.exact import ExactTokens
from xkv_service.selection.sketch import KeySketch
from xkv_service.spec import CompressionSpec

if TYPE_CHECKING:
    from xkv_service.calibration.calibration import Calibration, SharedBasis


Value = TypeVar("Value")


@dataclass(frozen=True)
class LowRank:
    """The keys or the values of one group: X ≈ factors · bases (paper, section 3.2).

    Args:
        factors: token factors A [T, r], columns in singular order; row t belongs to token t alone.
            Integer factors have the scales of their columns in `bases`.
        directions: [r, W], W the sum of `widths`: the bases; int8 ones and a calibration's, which many
            prefixes share, are to be multiplied by `scales`, row by row.
        widths: features of each layer, kv_heads x dimensions per head.
        scales: float32 [r], with int8 bases or a calibration's; else None.
        shared: what `directions` are the first of, where they are a calibration's.
    """

    factors: torch.Tensor | PackedFactors
    directions: torch.Tensor
    widths: tuple[int, ...]
    scales: torch.Tensor | None = None
    shared: SharedBasis | None = None

    @property
    def bases(self) -> torch.Tensor:
        """Layer bases side by side [r, W]; new memory where they are a calibration's."""
        return self.directions if self.scales is None else self.directions * self.scales[:, None]

    @property
    def rank(self) -> int:
        """r, columns of the token factors."""
        return self.factors.shape[1]

    @property
    def has_integer_bases(self) -> bool:
        """Whether the bases are int8, with scales."""
        return self.directions.dtype == torch.int8

    def layer_bases(self, position: int) -> torch.Tensor:
        """B_l [r, W_l] of the group's layer number `position`: a view, or float32 where there are scales."""
        mine = self.directions[:, self.columns(position)]
        return mine if self.scales is None else mine * self.scales[:, None]

    def columns(self, position: int) -> slice:
        """Which columns of the bases belong to the group's layer number `position`."""
        start = sum(self.widths[:position])
        return slice(start, start + self.widths[position])


@dataclass(frozen=True)
class GroupFactors:
    """One group of layers that share token factors. Keys are before RoPE.

    In a group of latent attention (MLA) the keys are the latents, and there are no values: None.
    """

    layout: GroupLayout
    keys: LowRank
    values: LowRank | None


@dataclass(frozen=True)
class LayerWindow:
    """A sliding layer's exact cache: keys as cached (rotated) and values, [w, kv_heads, D]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class PrefixFactors:
    """A compressed prefix of T tokens. Immutable and shared: sessions keep only their own tails.

    Args:
        spec: what it was compressed with. bytes_full: bytes of the exact cache in the model's dtype.
        token_ids: int32 [T] on the CPU.
        groups: token factors and layer bases, in layer order.
        sketches, landmarks: by layer, the selection index: one of the two, or neither. Landmarks are the mean
            rotated key of each chunk, [ceil(T / chunk), kv_heads, D]. Latent layers have none.
        planes: by layer with a derived index, the planes of the sketch that is made when it is used.
        exact: by layer, tokens kept exact (of a latent layer their latents, with values [n, 1, 0]).
        rope_keys: by latent layer, the rotated key of every token as cached, [T, rope_dim].
        windows: by layer, sliding layers. states: by layer, linear-attention layers.
        rotary: the rotary tables that `GroupLayout.rotary` numbers.
        fidelity: what was measured against the exact cache, or None when nothing was.
    """

    spec: CompressionSpec
    bytes_full: int
    token_ids: torch.Tensor
    groups: tuple[GroupFactors, ...]
    rotary: tuple[RotaryTable, ...]
    sketches: Mapping[int, KeySketch] = field(default_factory=dict)
    landmarks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    planes: Mapping[int, torch.Tensor] = field(default_factory=dict)
    exact: Mapping[int, ExactTokens] = field(default_factory=dict)
    rope_keys: Mapping[int, torch.Tensor] = field(default_factory=dict)
    windows: Mapping[int, LayerWindow] = field(default_factory=dict)
    states: Mapping[int, LayerState] = field(default_factory=dict)
    fidelity: Fidelity | None = None

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""
        return self.token_ids.numel()

    @property
    def layers(self) -> tuple[int, ...]:
        """The compressed layers, in order."""
        return tuple(layer for group in self.groups for layer in group.layout.layers)

    @property
    def whole_only(self) -> bool:
        """Whether some layers keep a window or a state of the prefix's end only: no shorter prefix then."""
        return bool(self.windows or self.states)

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor (a file adds its header)."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    def locate(self, layer: int) -> tuple[GroupFactors, int]:
        """The group that holds a compressed layer, and the layer's number in it.

        Raises:
            KeyError: the layer is not compressed.
        """
        for group in self.groups:
            if layer in group.layout.layers:
                return group, group.layout.layers.index(layer)
        raise KeyError(layer)

    def joined(self, others: Iterable[PrefixFactors]) -> PrefixFactors:
        """The factors of these groups and of other groups of the same prefix, in this order."""
        parts = [self, *others]
        return replace(
            self,
            groups=tuple(group for part in parts for group in part.groups),
            sketches=_merged(part.sketches for part in parts),
            landmarks=_merged(part.landmarks for part in parts),
            planes=_merged(part.planes for part in parts),
            exact=_merged(part.exact for part in parts),
            rope_keys=_merged(part.rope_keys for part in parts),
        )

    def with_fidelity(self, fidelity: Fidelity) -> PrefixFactors:
        """The same factors with what was measured."""
        return replace(self, fidelity=fidelity)

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of a `PrefixManifest` that the factors know; identity and origin are the caller's.

        Raises:
            ValueError: no fidelity was measured.
        """
        if self.fidelity is None:
            raise ValueError("an artifact needs its fidelity: use compress() or certify()")
        return {
            "spec": self.spec.canonical(),
            "tokens": self.tokens,
            "bytes_full": self.bytes_full,
            "groups": tuple(group.layout for group in self.groups),
            "windows": tuple(_window_layout(layer, window) for layer, window in sorted(self.windows.items())),
            "states": tuple(state.layout(layer) for layer, state in sorted(self.states.items())),
            "fidelity": self.fidelity,
        }

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its stored name, on the CPU and contiguous; docs/format.md has the shapes."""
        from xkv_service.factor_tensors import to_tensors

        return to_tensors(self)

    @classmethod
    def from_tensors(
        cls,
        manifest: PrefixManifest,
        tensors: Mapping[str, torch.Tensor],
        calibration: Calibration | None = None,
    ) -> PrefixFactors:
        """The factors that `to_tensors` was called on, from a file's tensors, which are not trusted.

        Args:
            manifest: says how many of which shape there are. tensors: by stored name, as docs/format.md.
            calibration: the one whose bases the artifact shares, where it has none of its own.

        Raises:
            CorruptArtifact: a tensor is missing, unknown, or not of the shape and dtype the manifest says.
            InvalidSpec: the artifact needs another calibration.
        """
        from xkv_service.factor_tensors import from_tensors

        return from_tensors(manifest, tensors, calibration)


def _merged(parts: Iterable[Mapping[int, Value]]) -> dict[int, Value]:
    return {layer: value for part in parts for layer, value in part.items()}


def _window_layout(layer: int, window: LayerWindow) -> WindowLayout:
    tokens, heads, dim = window.keys.shape
    return WindowLayout(
        layer=layer, tokens=tokens, kv_heads=heads, head_dim=dim, value_dim=window.values.shape[-1]
    )
