"""The manifest in a prefix blob's header: everything about the artifact but its tensors' bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

FORMAT: Final = "xkv-prefix"
VERSION: Final = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=4096)]
Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**62)]


Bits = Literal[2, 4, 8]
Runs = Annotated[tuple[tuple[Bits, Count], ...], Field(max_length=8)]
StateDtype = Literal["bfloat16", "float16", "float32"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Extended(_Strict):
    """A record that got fields after the first files were written.

    Those with their defaults are left out of the JSON: an artifact that has no use for them is the file it
    always was.
    """

    later_fields: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        unused = {name for name in self.later_fields if getattr(self, name) == _default(self, name)}
        return {name: value for name, value in fields.items() if name not in unused}


def _default(record: BaseModel, field: str) -> Any:
    return type(record).model_fields[field].default


class ModelParts(_Strict):
    """SHA-256 of parts of a model's files, as `fingerprint.digest_model` makes them.

    Args:
        weights: of the weight files. tokenizer: of tokenizer files and chat templates. config: of the rest.
    """

    weights: Sha256
    tokenizer: Sha256
    config: Sha256


class ModelIdentity(_Extended):
    """Which model the prefix was prefilled with. Only `fingerprint` decides whether an artifact fits.

    Args:
        fingerprint: over config, weights, tokenizer, chat templates and dtype.
        name, architecture: for people. dtype: the dtype that the model runs in.
        parts: to say what differs where the fingerprint does; None in files of before.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"parts"})

    fingerprint: Sha256
    name: Name
    architecture: Name
    dtype: Name
    parts: ModelParts | None = None

    def differs_from(self, other: ModelIdentity) -> str:
        """What is another in it than in `other`, in words, as far as both say; empty where unknown."""
        found = [f"another dtype ({self.dtype}, not {other.dtype})"] if self.dtype != other.dtype else []
        if self.parts is not None and other.parts is not None:
            mine, theirs = self.parts.model_dump(), other.parts.model_dump()
            found += [words for part, words in _DIFFERENT.items() if mine[part] != theirs[part]]
        return ", ".join(found)


_DIFFERENT = {"weights": "other weights", "tokenizer": "another tokenizer", "config": "another config"}


class DocumentRef(_Strict):
    """Where the prefix came from: for people, never for matching."""

    uri: Name
    sha256: Sha256


class GroupLayout(_Extended):
    """One group of layers that share token factors.

    In a group of latent attention (MLA) the keys are the latents: one head each, value widths and `rank_v` 0.

    Args:
        layers: layer indices in the model.
        kv_heads: heads of each layer.
        key_widths, value_widths: kv_heads x dimensions per head of each layer.
        rotary: for each layer, which `rotary.{i}.*` table rotates its keys.
        rank_k, rank_v: columns of the token factors of keys and of values.
        rope_widths: latent attention only: dimensions of each layer's rotated key, kept exact.
        columns_k, columns_v: token factors of different bits only: (bits, columns) from the first column on.
    """

    later_fields = frozenset({"rope_widths", "columns_k", "columns_v"})

    layers: tuple[Index, ...]
    kv_heads: tuple[Index, ...]
    key_widths: tuple[Index, ...]
    value_widths: tuple[Index, ...]
    rotary: tuple[Index, ...]
    rank_k: Count
    rank_v: Index
    rope_widths: tuple[Index, ...] = ()
    columns_k: Runs = ()
    columns_v: Runs = ()

    @property
    def latent(self) -> bool:
        """Whether the layers cache latents (MLA)."""
        return bool(self.rope_widths)


class WindowLayout(_Strict):
    """One sliding-window layer, kept exact: the last `tokens` tokens, keys as cached (rotated)."""

    layer: Index
    tokens: Count
    kv_heads: Count
    head_dim: Count
    value_dim: Count


class StateShape(_Strict):
    """One state tensor of a linear-attention layer, without its batch dimension."""

    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    dtype: StateDtype


class StateLayout(_Strict):
    """One linear-attention layer, kept exact: its convolution and recurrent states after the last token."""

    layer: Index
    conv: tuple[StateShape, ...]
    recurrent: tuple[StateShape, ...]


class PartFidelity(_Strict):
    """What was measured of a part: the leading columns of every group's token factors, others left out.

    Args:
        share: the part holds at least that share of the columns, in the fewest leading blocks that do.
        top1_agreement, kl: as those of all columns.
    """

    share: float = Field(gt=0, lt=1)
    top1_agreement: float = Field(ge=0, le=1)
    kl: float = Field(ge=0)


def _growing(parts: tuple[PartFidelity, ...]) -> tuple[PartFidelity, ...]:
    if any(one.share >= other.share for one, other in pairwise(parts)):
        raise ValueError("shares must grow from part to part")
    return parts


Parts = Annotated[tuple[PartFidelity, ...], Field(max_length=8), AfterValidator(_growing)]


class Fidelity(_Extended):
    """What was measured against the exact cache when the artifact was made.

    Args:
        top1_agreement: share of held-back positions where the most likely next token is the same, 0 to 1.
        kl: mean KL divergence (nats) of the compressed cache's next-token distribution from the exact one's.
        positions: held-back positions measured.
        key_error, value_error: relative Frobenius reconstruction error of each group; of latent attention,
            that of the latents, and 0.
        kl_limit: nats above which `kl` is low, as the calibration said that the artifact was made with; None
            without one, where its ratio was not asked for, and in files of before.
        parts: the same of leading columns alone, smallest part first, where that was measured.
    """

    later_fields = frozenset({"kl_limit", "parts"})

    top1_agreement: float = Field(ge=0, le=1)
    kl: float = Field(ge=0)
    positions: Index
    key_error: tuple[float, ...]
    value_error: tuple[float, ...]
    kl_limit: float | None = Field(default=None, ge=0)
    parts: Parts = ()


class PrefixManifest(_Extended):
    """A prefix artifact's description. `tensors` holds the SHA-256 of each tensor's bytes.

    `instead_of` is the id of the artifact that this one was made instead of, whose fidelity was low.
    `retried`: the fidelity of this one is low, and compressing it otherwise was no better.
    """

    later_fields = frozenset({"states", "instead_of", "retried"})

    format: Literal["xkv-prefix"] = FORMAT
    version: Literal[1] = VERSION
    id: Sha256
    model: ModelIdentity
    namespace: Namespace
    spec: dict[str, Any]
    tokens: Count
    bytes_full: Count
    groups: tuple[GroupLayout, ...]
    windows: tuple[WindowLayout, ...] = ()
    states: tuple[StateLayout, ...] = ()
    document: DocumentRef
    fidelity: Fidelity
    instead_of: Sha256 | None = None
    retried: bool = False
    created: AwareDatetime
    tensors: dict[str, Sha256] = {}
