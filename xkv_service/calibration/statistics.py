"""What a calibration keeps of its sample: sums that later documents are added to, without the text.

Means over the tokens, float32, upper triangles where they are symmetric: half of what is summed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from xkv_artifacts.calibration_format import STATISTICS
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.keys import sample_sha256
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.moments import KindMoments, Moments
from xkv_service.calibration.observed import Observed
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.layout import LayerLayout

MOST_BYTES = 1 << 30
"""Larger statistics are left out: the calibration is a file that people copy (docs/calibration.md)."""
DOCUMENTS = f"{STATISTICS}documents"
_COUNTS = f"{STATISTICS}counts"

Tensors = Mapping[str, torch.Tensor]


def document_digest(document: ProbedPrefix) -> str:
    """SHA-256 (hex) of a document's token ids, by which it is known again."""
    return sample_sha256([document.token_ids])


@dataclass(frozen=True)
class Statistics:
    """Sums over documents, and which ones.

    Args:
        observed: the sums. documents: `document_digest` of each document in them.
    """

    observed: Observed
    documents: frozenset[str]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its stored name (docs/format.md), on the CPU; none where they are too large."""
        moments = self.observed.moments
        if statistics_bytes(moments) > MOST_BYTES:
            return {}
        digests = b"".join(bytes.fromhex(one) for one in sorted(self.documents))
        named = {
            _COUNTS: torch.tensor([moments.tokens, self.observed.query_tokens]),
            DOCUMENTS: torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(-1, 32),
        }
        for place, layer in enumerate(moments.layers):
            for kind in moments.kinds:
                name, held = f"{STATISTICS}layer.{layer.index}.{kind}", moments.kind(kind)
                width = held.products[place].shape[0]
                named[f"{name}.moments"] = _packed(held.products[place][:, :width] / moments.tokens)
                named[f"{name}.cross"] = held.products[place][:, width:] / moments.tokens
                named[f"{name}.mean"] = held.sums[place] / moments.tokens
            queries = self.observed.queries[place] / max(1, self.observed.query_tokens)
            named[f"{STATISTICS}layer.{layer.index}.queries"] = _packed(queries)
        return {name: _stored(tensor) for name, tensor in named.items()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Tensors,
        calibration: Calibration,
        layers: Sequence[LayerLayout],
        reach: int,
        device: torch.device,
    ) -> Statistics:
        """From a file's tensors, which are not trusted.

        Args:
            calibration: the one that they are of. layers: the model's, that it is about.
            reach: neighbours whose products are wanted.

        Raises:
            CorruptArtifact: names the first tensor that is missing or not of the shape it must have.
            InvalidSpec: products of so many neighbours are not kept.
        """
        read = _Reader(tensors, layers, reach, device)
        tokens, query_tokens = read.counts()
        latent = layers[0].kind == "latent"
        keys = read.moments("key", tokens)
        values = KindMoments([], []) if latent else read.moments("value", tokens)
        moments = Moments(tuple(layers), reach, keys, values, tokens)
        queries = [read.queries(layer) * query_tokens for layer in layers]
        planes = [] if latent else [calibration.planes[layer.index][0].long() for layer in layers]
        return cls(Observed(moments, queries, query_tokens, planes), documents_of(tensors))


def statistics_bytes(moments: Moments) -> int:
    """Bytes of the second moments as they are stored."""
    numbers = 0
    for held in (moments.keys, moments.values):
        for product in held.products:
            width, span = product.shape
            numbers += width * (width + 1) // 2 + width * (span - width) + width
    return 4 * numbers


def documents_of(tensors: Tensors) -> frozenset[str]:
    """Digests of the documents that are in a calibration's sums; none where it keeps no sums.

    Raises:
        CorruptArtifact: they are no digests.
    """
    found = tensors.get(DOCUMENTS)
    if found is None:
        return frozenset()
    if found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != 32:
        raise CorruptArtifact(f"tensor {DOCUMENTS} is {found.dtype} {list(found.shape)}")
    return frozenset(bytes(row).hex() for row in found.tolist())


class _Reader:
    """Takes checked tensors by name."""

    def __init__(
        self, tensors: Tensors, layers: Sequence[LayerLayout], reach: int, device: torch.device
    ) -> None:
        self._tensors, self._layers, self._reach, self._device = tensors, layers, reach, device

    def counts(self) -> tuple[int, int]:
        found = self._tensors.get(_COUNTS)
        if found is None or found.dtype != torch.int64 or found.shape != (2,) or int(found.min()) < 1:
            raise CorruptArtifact(f"tensor {_COUNTS} is missing, or not two counts")
        tokens, query_tokens = found.tolist()
        return tokens, query_tokens

    def moments(self, kind: str, tokens: int) -> KindMoments:
        widths = [one.key_width if kind == "key" else one.value_width for one in self._layers]
        products, sums = [], []
        for place, (layer, width) in enumerate(zip(self._layers, widths, strict=True)):
            name = f"{STATISTICS}layer.{layer.index}.{kind}"
            own = _unpacked(self._take(f"{name}.moments", (width * (width + 1) // 2,)), width)
            cross = self._cross(f"{name}.cross", width, widths[place + 1 :])
            products.append(torch.cat([own, cross], 1) * tokens)
            sums.append(self._take(f"{name}.mean", (width,)) * tokens)
        return KindMoments(products, sums)

    def queries(self, layer: LayerLayout) -> torch.Tensor:
        """Those of latent attention have dimensions of their own."""
        name, dim = f"{STATISTICS}layer.{layer.index}.queries", layer.head_dim
        found = self._take(name, (layer.query_heads, None))
        if layer.kind == "latent":
            dim = (isqrt(8 * found.shape[1] + 1) - 1) // 2
        if found.shape[1] != dim * (dim + 1) // 2:
            raise CorruptArtifact(f"tensor {name} is {found.dtype} {list(found.shape)}")
        return _unpacked(found, dim)

    def _cross(self, name: str, width: int, further: Sequence[int]) -> torch.Tensor:
        """Products with the neighbours within reach; more of them may be kept."""
        wanted = sum(further[: self._reach])
        found = self._take(name, (width, None))
        if found.shape[1] < wanted:
            raise InvalidSpec(
                f"the earlier calibration keeps no products of {self._reach + 1} neighbouring layers",
                hint="use its --group-size, or calibrate without --from",
            )
        return found[:, :wanted]

    def _take(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None:
            raise CorruptArtifact(f"tensor {name} is missing")
        fits = found.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, found.shape, strict=True)
        )
        if found.dtype != torch.float32 or not fits or not bool(torch.isfinite(found).all()):
            raise CorruptArtifact(f"tensor {name} is {found.dtype} {list(found.shape)}, or not finite")
        return found.to(self._device, torch.float64)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()


def _packed(square: torch.Tensor) -> torch.Tensor:
    """The upper triangle by rows: [..., W, W] -> [..., W (W + 1) / 2]."""
    rows, columns = torch.triu_indices(*square.shape[-2:], device=square.device)
    return square[..., rows, columns]


def _unpacked(packed: torch.Tensor, width: int) -> torch.Tensor:
    """What `_packed` was called on, if it was symmetric."""
    rows, columns = torch.triu_indices(width, width, device=packed.device)
    square = packed.new_zeros(*packed.shape[:-1], width, width)
    square[..., rows, columns] = packed
    square[..., columns, rows] = packed
    return square
