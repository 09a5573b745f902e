"""`Calibration`: shared bases and what each of their directions is worth, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from xkv_artifacts.errors import CorruptArtifact
from xkv_service.errors import InvalidSpec
from xkv_service.factorization.weights import apply_blocks
from xkv_service.modeling.layout import LayerLayout, ModelLayout

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = ("key", "value")
Tensors = Mapping[str, torch.Tensor]
_UNEVEN = 1e-4


@dataclass(frozen=True, eq=False)
class SharedBasis:
    """The directions of one group's keys (before RoPE) or values, most worth first.

    X ≈ (X P) B with P = M Bᵀ, where M is the metric that says which errors matter: B is orthonormal in it,
    B M Bᵀ = 1, so the error of a token that keeps some directions is the sum of the others' energies.

    Args:
        bases: float32 [R, W], layer bases side by side, W features of the group's layers.
        metric: by layer of the group, float32 [kv_heads, D, D], symmetric positive definite.
        energies: float32 [W], mean over tokens of the squared coordinate along each direction: what
            leaving it out adds to the error in the metric. The first R belong to `bases`.
    """

    bases: torch.Tensor
    metric: tuple[torch.Tensor, ...]
    energies: torch.Tensor
    _placed: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)
    _on: dict[torch.device, SharedBasis] = field(default_factory=dict, repr=False)

    def placed(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """`bases` on a device in a dtype: one copy for all prefixes that decode from them there."""
        if (self.bases.device, self.bases.dtype) == (device, dtype):
            return self.bases
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = self.bases.to(device, dtype)
        return self._placed[device, dtype]

    def projection(self, rank: int) -> torch.Tensor:
        """P [W, rank], float32: token factors are X P."""
        return apply_blocks(self.metric, self.bases[:rank].T)

    def leading(self, rank: int) -> SharedBasis:
        """The basis with its first directions only; the energies of all stay known."""
        return SharedBasis(self.bases[:rank].clone(), self.metric, self.energies)

    def on(self, device: torch.device) -> SharedBasis:
        """The same basis on a device that documents are compressed on: copied there once, and kept as long as
        this one lives.

        That takes 4 R W bytes and the metric. A whole calibration of Llama-3.1-8B in groups of four, of three
        eighths of all directions, takes 0.41 GiB, which compressing a document over it takes anyway.
        """
        if device not in self._on:
            self._on[device] = self.to(device)
        return self._on[device]

    def to(self, device: torch.device) -> SharedBasis:
        """The same basis on another device."""
        return SharedBasis(
            self.bases.to(device), tuple(one.to(device) for one in self.metric), self.energies.to(device)
        )


@dataclass(frozen=True, eq=False)
class CalibratedGroup:
    """Adjacent layers that share token factors, with their bases.

    In a group of latent attention (MLA) the keys are the latents, and there are no values: None.
    """

    layers: tuple[int, ...]
    keys: SharedBasis
    values: SharedBasis | None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it has bases of."""
        return KINDS if self.values is not None else KINDS[:1]

    def basis(self, kind: Kind) -> SharedBasis:
        """Its keys' or its values'.

        Raises:
            KeyError: it has none of this kind.
        """
        found = self.keys if kind == "key" else self.values
        if found is None:
            raise KeyError(kind)
        return found

    def fits(self, layers: Mapping[int, LayerLayout]) -> bool:
        """Whether its layers, by index, have the heads and dimensions it was made for."""
        mine = [layers[index] for index in self.layers]
        shapes = [metric.shape[:2] for kind in self.kinds for metric in self.basis(kind).metric]
        keys = [(one.kv_heads, one.head_dim) for one in mine]
        values = [(one.kv_heads, one.value_dim) for one in mine if one.kind != "latent"]
        return shapes == [*keys, *values]

    def leading(self, rank_k: int, rank_v: int) -> CalibratedGroup:
        """The group with so many directions of each."""
        values = None if self.values is None else self.values.leading(rank_v)
        return CalibratedGroup(self.layers, self.keys.leading(rank_k), values)


@dataclass(frozen=True, eq=False)
class Calibration:
    """One model's calibration.

    Args:
        groups: of all full-attention layers, in order.
        planes: by layer, int16 [kv_heads, D // 2, 2]: pairs of key dimensions that RoPE turns together (or
            that do not turn), those that tell most about scores first. Latent layers have none.
        figures: what was measured, plain JSON values; docs/calibration.md says what they are.
        id: of the artifact, "" before it is stored.
    """

    groups: tuple[CalibratedGroup, ...]
    planes: Mapping[int, torch.Tensor]
    figures: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def group_of(self, layers: tuple[int, ...]) -> CalibratedGroup:
        """The group of exactly these layers.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if group.layers == layers:
                return group
        raise KeyError(layers)

    def layer_groups(self, layout: ModelLayout) -> tuple[tuple[LayerLayout, ...], ...]:
        """The model's compressible layers in the groups of the calibration.

        Raises:
            InvalidSpec: the calibration is about other layers.
        """
        by_index = {layer.index: layer for layer in layout.compressible}
        mine = [index for group in self.groups for index in group.layers]
        if mine != list(by_index) or not all(group.fits(by_index) for group in self.groups):
            raise InvalidSpec(
                f"calibration {self.id[:12]} is about layers {mine} of other shapes or numbers than this "
                f"model's {list(by_index)}",
                hint="use a calibration of this very model",
            )
        return tuple(tuple(by_index[index] for index in group.layers) for group in self.groups)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its stored name (docs/format.md), on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in self._named()}

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, group in enumerate(self.groups):
            for kind in group.kinds:
                basis, name = group.basis(kind), f"group.{number}.{kind}"
                yield f"{name}.bases", basis.bases
                yield f"{name}.energies", basis.energies
                for layer, metric in zip(group.layers, basis.metric, strict=True):
                    yield f"layer.{layer}.{kind}.metric", metric
        for layer, planes in self.planes.items():
            yield f"layer.{layer}.planes", planes

    @classmethod
    def from_tensors(
        cls, groups: tuple[tuple[int, ...], ...], tensors: Tensors, figures: Mapping[str, Any], identity: str
    ) -> Calibration:
        """The calibration that `to_tensors` was called on, from a file's tensors, which are not trusted.

        Raises:
            CorruptArtifact: names the first tensor that is missing or not of the shape it must have.
        """
        read = _Reader(tensors)
        made = tuple(read.group(number, layers) for number, layers in enumerate(groups))
        planes = {
            layer: read.planes(layer, metric)
            for group in made
            if group.values is not None
            for layer, metric in zip(group.layers, group.keys.metric, strict=True)
        }
        read.finish()
        return cls(made, planes, figures, identity)


class _Reader:
    """Takes checked tensors by name."""

    def __init__(self, tensors: Tensors) -> None:
        self._left = dict(tensors)

    def group(self, number: int, layers: tuple[int, ...]) -> CalibratedGroup:
        """Of latents where there are no bases of values."""
        made: dict[Kind, SharedBasis] = {}
        for kind in KINDS if f"group.{number}.value.bases" in self._left else KINDS[:1]:
            name = f"group.{number}.{kind}"
            metric = tuple(self._metric(f"layer.{layer}.{kind}.metric") for layer in layers)
            width = sum(one.shape[0] * one.shape[1] for one in metric)
            bases = self._take(f"{name}.bases", torch.float32, (None, width))
            energies = self._take(f"{name}.energies", torch.float32, (width,))
            if not 0 < bases.shape[0] <= width:
                raise CorruptArtifact(f"tensor {name}.bases has {len(bases)} directions of {width} features")
            if float(energies[-1]) < 0 or bool((energies[1:] > energies[:-1]).any()):
                raise CorruptArtifact(f"tensor {name}.energies is not in descending order down to 0")
            made[kind] = SharedBasis(bases, metric, energies)
        return CalibratedGroup(layers, made["key"], made.get("value"))

    def planes(self, layer: int, metric: torch.Tensor) -> torch.Tensor:
        """Of a layer whose keys have this metric."""
        name, (heads, dim, _) = f"layer.{layer}.planes", metric.shape
        found = self._take(name, torch.int16, (heads, dim // 2, 2))
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < dim:
            raise CorruptArtifact(f"tensor {name} points outside the head")
        return found

    def finish(self) -> None:
        for name in self._left:
            raise CorruptArtifact(f"tensor {name} is not part of the format")

    def _metric(self, name: str) -> torch.Tensor:
        found = self._take(name, torch.float32, (None, None, None))
        if found.shape[1] != found.shape[2] or not found.numel():
            raise CorruptArtifact(f"tensor {name} is {list(found.shape)}: not square")
        uneven = (found - found.mT).abs().amax() > _UNEVEN * found.abs().amax()
        if uneven or bool(torch.linalg.cholesky_ex(found.double()).info.any()):
            raise CorruptArtifact(f"tensor {name} is not symmetric and positive definite")
        return found

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> torch.Tensor:
        found = self._left.pop(name, None)
        if found is None:
            raise CorruptArtifact(f"tensor {name} is missing")
        fits = found.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, found.shape, strict=True)
        )
        if found.dtype != dtype or not fits or not bool(torch.isfinite(found).all()):
            raise CorruptArtifact(f"tensor {name} is {found.dtype} {list(found.shape)}, or not finite")
        return found
