"""The calibration file: what one model's layers share, made once from a sample of text (docs/format.md).

It is laid out and covered by checksums as a prefix is. torch is imported only where tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from xkv_artifacts.checked_file import check_tensors, lay_out, open_header, parse_manifest, read_tensors
from xkv_artifacts.errors import CorruptArtifact, InvalidKey
from xkv_artifacts.header import Header
from xkv_artifacts.keys import calibration_id
from xkv_artifacts.manifest import Count, Index, ModelIdentity, Sha256

if TYPE_CHECKING:
    import torch

FORMAT: Final = "xkv-calibration"
VERSIONS: Final = (1, 2)
"""2 is 1 with statistics."""
STATISTICS: Final = "statistics."
"""What names of tensors begin with that only a later calibration reads."""


def _plain(value: Any) -> Any:
    """The value as JSON gives it back, so that what is written equals what is read."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


PlainJson = Annotated[dict[str, JsonValue], BeforeValidator(_plain)]
Group = Annotated[tuple[Index, ...], Field(min_length=1)]
_NO_ID = "0" * 64


class CalibrationSample(BaseModel):
    """The text that a model was run over. `sha256` is `keys.sample_sha256` of its documents' token ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: Count
    tokens: Count
    sha256: Sha256


class CalibrationManifest(BaseModel):
    """A calibration's description.

    Args:
        id: `identified` fills it in: a hash over model, sample, settings, groups and tensors.
        version: `identified` fills it in: 2 with statistics, 1 without.
        model: whose layers it is about. Only its fingerprint decides whether the calibration fits.
        sample: the text it was made from. settings: how, plain JSON values.
        groups: layer indices of each group of layers that share bases.
        figures: what was measured on the way, plain JSON values, no part of the id. Some decide how documents
            are compressed by default (docs/format.md); who reads those checks them.
        tensors: SHA-256 of each tensor's bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["xkv-calibration"] = FORMAT
    version: Literal[1, 2] = 1
    id: Sha256 = _NO_ID
    model: ModelIdentity
    sample: CalibrationSample
    settings: PlainJson
    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    figures: PlainJson = {}
    created: AwareDatetime
    tensors: dict[str, Sha256] = {}


def identified(manifest: CalibrationManifest, tensors: Mapping[str, torch.Tensor]) -> CalibrationManifest:
    """The manifest with the id and the version of this content.

    Raises:
        CorruptArtifact: a tensor or a manifest that cannot be stored.
    """
    version = 2 if any(map(is_statistic, tensors)) else 1
    versioned = manifest.model_copy(update={"version": version})
    header = lay_out(versioned, tensors).header
    return versioned.model_copy(update={"id": _id(_parse(header), header)})


def is_statistic(name: str) -> bool:
    """Whether a tensor is one of the statistics."""
    return name.startswith(STATISTICS)


def is_no_statistic(name: str) -> bool:
    """Whether a tensor is one that prefixes are compressed with."""
    return not is_statistic(name)


def write_calibration(
    file: BinaryIO, manifest: CalibrationManifest, tensors: Mapping[str, torch.Tensor]
) -> CalibrationManifest:
    """Write one calibration; the same input makes the same bytes.

    Args:
        file: open for writing bytes, at its start.
        manifest: `identified`; its `tensors` are filled in here.
        tensors: by name, as docs/format.md lists them.

    Returns:
        The manifest as written, with the SHA-256 of each tensor.

    Raises:
        CorruptArtifact: manifest and tensors do not fit together (nothing is written).
    """
    ready = lay_out(manifest, tensors)
    written = _checked(ready.header)
    ready.write(file)
    return written


def read_manifest(file: BinaryIO) -> CalibrationManifest:
    """Read and check a calibration's header alone; its tensors' bytes are not looked at.

    Raises:
        CorruptArtifact, UnsupportedFormat: the file is no calibration that this code reads.
    """
    return _checked(open_header(file))


def read_calibration(
    file: BinaryIO, wanted: Callable[[str], bool] = is_no_statistic
) -> tuple[CalibrationManifest, dict[str, torch.Tensor]]:
    """Read a calibration, every byte that is read checked. Raises as `read_manifest`.

    Args:
        wanted: whether a tensor of this name is read; by default statistics, most of the file, are not.
    """
    header = open_header(file)
    manifest = _checked(header)
    return manifest, read_tensors(file, header, manifest.tensors, wanted)


def verify(file: BinaryIO) -> CalibrationManifest:
    """Re-read and check every byte, a few MiB at a time, without torch. Raises as `read_manifest`."""
    header = open_header(file)
    manifest = _checked(header)
    check_tensors(file, header, manifest.tensors)
    return manifest


def _checked(header: Header) -> CalibrationManifest:
    manifest = _parse(header)
    if _id(manifest, header) != manifest.id:
        raise CorruptArtifact(
            f"the id {manifest.id} is not that of this model, sample, settings, groups and tensors"
        )
    return manifest


def _parse(header: Header) -> CalibrationManifest:
    manifest = parse_manifest(header, CalibrationManifest, FORMAT, *VERSIONS)
    if (manifest.version == 2) != any(map(is_statistic, header.tensors)):
        raise CorruptArtifact(f"manifest field version: {manifest.version}, with statistics it is 2, else 1")
    layers = [layer for group in manifest.groups for layer in group]
    if len(set(layers)) < len(layers):
        raise CorruptArtifact("manifest field groups: a layer is named twice")
    return manifest


def _id(manifest: CalibrationManifest, header: Header) -> str:
    """Shapes and dtypes count too: the same bytes in another shape are other numbers."""
    tensors = {
        name: [info.dtype, info.shape, manifest.tensors[name]] for name, info in header.tensors.items()
    }
    content = {"groups": manifest.groups, "tensors": tensors}
    try:
        return calibration_id(manifest.model.fingerprint, manifest.sample.sha256, manifest.settings, content)
    except InvalidKey as error:
        raise CorruptArtifact(f"manifest: {error.message}") from None
