"""The session file: a conversation and its tail, beside the prefix that it starts with (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from xkv_artifacts.atomic_file import write_whole
from xkv_artifacts.blobs import store_errors
from xkv_artifacts.checked_file import LaidOut, lay_out, open_header, parse_manifest, read_tensors
from xkv_artifacts.errors import CorruptArtifact, StoreError, UnsupportedFormat, XKVError
from xkv_artifacts.format import TOKENS
from xkv_artifacts.header import Header
from xkv_artifacts.manifest import Count, Index, ModelIdentity, Sha256

if TYPE_CHECKING:
    import torch

FORMAT: Final = "xkv-session"
VERSION: Final = 1
DOCUMENT = "document"


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    content: str


class SessionManifest(BaseModel):
    """A saved session's description.

    Args:
        model: whose cache it is. artifact: the id of the prefix's artifact; None: the prefix is exact.
        selection: how tokens of the prefix are chosen, plain values; None with an exact prefix.
        tokens: all that the cache holds. prefix_tokens: how many of them are the prefix; 0: there is none.
        folded: tokens of each part of the tail that was made into factors, directly behind the prefix.
        system_prompt, template: how the conversation is rendered, the document (a tensor) first.
        messages: the conversation.
        tensors: SHA-256 of each tensor's bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["xkv-session"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelIdentity
    artifact: Sha256 | None
    selection: dict[str, Any] | None
    tokens: Count
    prefix_tokens: Index
    folded: tuple[Count, ...]
    system_prompt: str | None
    template: Literal["chat", "raw"]
    messages: tuple[Message, ...]
    created: AwareDatetime
    tensors: dict[str, Sha256] = {}


def lay_out_session(manifest: SessionManifest, tensors: Mapping[str, torch.Tensor]) -> LaidOut:
    """A session's bytes, ready to be written. Arguments and errors as of `save_session`."""
    ready = lay_out(manifest, tensors)
    _parse(ready.header)
    return ready


def save_session(path: Path, manifest: SessionManifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a session file in one step. A session that is there already is replaced; another file is not.

    Args:
        manifest: its `tensors` are filled in here.
        tensors: by name; `tokens` is int32 [tokens], `document` the UTF-8 bytes of the text.

    Raises:
        StoreError: no permission, no space, or another file is there.
        CorruptArtifact: manifest and tensors do not fit together.
    """
    ready = lay_out_session(manifest, tensors)
    with store_errors("save the session to", str(path)):
        if path.exists():
            _refuse_to_replace(path)
        write_whole(path, ready.write)


def load_session(path: Path) -> tuple[SessionManifest, dict[str, torch.Tensor]]:
    """Read a session file, every byte checked.

    Raises:
        StoreError: there is no such file, or it cannot be read.
        CorruptArtifact: it is not what was written. UnsupportedFormat: it is no session of this version.
    """
    try:
        with store_errors("read the session", str(path)), path.open("rb") as file:
            return read_session(file)
    except (CorruptArtifact, UnsupportedFormat) as error:
        raise type(error)(f"session {path}: {error.message}", hint=error.hint) from None


def read_session(file: BinaryIO) -> tuple[SessionManifest, dict[str, torch.Tensor]]:
    """As `load_session`, from an open file."""
    header = open_header(file)
    manifest = _parse(header)
    return manifest, read_tensors(file, header, manifest.tensors)


def _parse(header: Header) -> SessionManifest:
    manifest = parse_manifest(header, SessionManifest, FORMAT, VERSION)
    tokens = header.tensors.get(TOKENS)
    if tokens is None or (tokens.dtype, tokens.shape) != ("I32", (manifest.tokens,)):
        raise CorruptArtifact(f"tensor {TOKENS}: must be I32 of shape [{manifest.tokens}]")
    document = header.tensors.get(DOCUMENT)
    if document is not None and (document.dtype != "U8" or len(document.shape) != 1):
        raise CorruptArtifact(f"tensor {DOCUMENT}: must be U8 of one dimension")
    if manifest.prefix_tokens + sum(manifest.folded) > manifest.tokens:
        raise CorruptArtifact("manifest: prefix and folded tokens are more than all tokens")
    if (manifest.artifact is None) != (manifest.selection is None):
        raise CorruptArtifact("manifest: artifact and selection go together")
    return manifest


def _refuse_to_replace(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _parse(open_header(file))
    except XKVError:
        raise StoreError(
            f"{path} exists and is no session", hint="give another name, or delete it first"
        ) from None
