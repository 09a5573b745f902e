"""Artifact ids and block hashes: what says that two prefixes, or two calibrations, are the same.

Everything here is a pure function of its arguments: no clock, no file name, never Python's `hash`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from xkv_artifacts.errors import InvalidKey, InvalidNamespace

if TYPE_CHECKING:
    import numpy
    import torch

    TokenIds: TypeAlias = (
        Sequence[int] | numpy.ndarray[Any, numpy.dtype[numpy.signedinteger[Any]]] | torch.Tensor
    )

BLOCK_TOKENS = 64
DIGEST_BYTES = 8

_ID_DOMAIN = b"xkv-prefix-id-1"
_CALIBRATION_DOMAIN = b"xkv-calibration-id-1"
_TAIL_DOMAIN = b"xkv-tail-id-1"
_BLOCK_DOMAIN = b"xkv-prefix-block-1"
_WITHOUT_FIRST_BIT = bytes(byte & 0x7F for byte in range(256))
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_namespace(namespace: str) -> str:
    """Return `namespace` if it is 1 to 64 letters, digits and "._-".

    Raises:
        InvalidNamespace: empty, longer than 64, "." or "..", or with other characters than those.
    """
    if not _NAMESPACE.fullmatch(namespace) or namespace in (".", ".."):
        raise InvalidNamespace(
            f"namespace {namespace!r} is not allowed",
            hint="use 1 to 64 letters, digits, dots, dashes and underscores",
        )
    return namespace


def is_artifact_id(text: str) -> bool:
    """Whether `text` is 64 lower-case hex digits, the only names that blobs are stored under."""
    return _SHA256.fullmatch(text) is not None


# The highest byte of a number from 0 to 2^31 - 1: prompts of 134k ids are checked at every lookup.
_NOT_NEGATIVE = bytes(range(128))


def token_bytes(token_ids: TokenIds) -> bytes:
    """Token ids as little-endian int32, as in a blob's `tokens` tensor.

    Args:
        token_ids: a sequence of integers, or (faster) int32 or int64 `[tokens]`: an `array`, a NumPy array
            or a torch tensor on the CPU.

    Raises:
        InvalidKey: a token id is not an integer from 0 to 2^31 - 1, or an array is of another dtype or shape.
    """
    if not isinstance(token_ids, list | tuple | range):
        return _array_bytes(token_ids)
    try:
        packed = array("i", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidKey(f"token ids are not 32-bit integers: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    data = packed.tobytes()
    if data[3::4].translate(None, delete=_NOT_NEGATIVE):
        raise InvalidKey(f"token id {min(token_ids)} is negative")
    return data


def _array_bytes(token_ids: TokenIds) -> bytes:
    import numpy

    try:
        ids = numpy.asarray(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:  # as torch says that a tensor is no array
        raise InvalidKey(f"token ids are not 32-bit integers: {error}") from None
    if ids.ndim != 1 or ids.dtype.kind != "i" or ids.dtype.itemsize < 4:
        found = f"{ids.dtype} of shape {list(ids.shape)}"
        raise InvalidKey(f"token ids are {found}", hint="use int32 or int64 of one dimension")
    if len(ids) and ids.min() < 0:
        raise InvalidKey(f"token id {ids.min()} is negative")
    if len(ids) and ids.max() >= 2**31:
        raise InvalidKey(f"token ids are not 32-bit integers: {ids.max()} is too large")
    return ids.astype("<i4", copy=False).tobytes()


def artifact_id(fingerprint: str, namespace: str, token_ids: TokenIds, spec: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the model fingerprint, namespace, token ids and compression spec.

    Args:
        fingerprint: the model's fingerprint, 64 hex digits.
        namespace: whose artifact it is; the same document in two namespaces makes two artifacts.
        token_ids: the rendered prefix.
        spec: plain JSON values (`CompressionSpec.canonical()`); 8 and 8.0 are the same setting.

    Raises:
        InvalidNamespace, InvalidKey: an argument that no artifact can have.
    """
    return artifact_id_of_bytes(fingerprint, namespace, token_bytes(token_ids), spec)


def artifact_id_of_bytes(fingerprint: str, namespace: str, tokens: bytes, spec: Mapping[str, Any]) -> str:
    """`artifact_id` for token ids that are already little-endian int32 bytes."""
    if not tokens:
        raise InvalidKey("a prefix has at least one token")
    fields = _framed(_ID_DOMAIN, *_owner(fingerprint, namespace), tokens, canonical_json(spec))
    return hashlib.sha256(b"".join(fields)).hexdigest()


def calibration_id(fingerprint: str, sample: str, settings: Mapping[str, Any], content: Any) -> str:
    """SHA-256 (hex) over all that decides what a calibration does.

    Args:
        fingerprint, sample: SHA-256 (hex) of the model, and of the token ids it was run over.
        settings, content: plain JSON values: how it was made, and what came out (its tensors' checksums).

    Raises:
        InvalidKey: settings that JSON cannot hold.
    """
    texts = (fingerprint.encode("ascii"), sample.encode("ascii"))
    fields = _framed(_CALIBRATION_DOMAIN, *texts, canonical_json(settings), canonical_json(content))
    return hashlib.sha256(b"".join(fields)).hexdigest()


def tail_id(fingerprint: str, namespace: str, tokens: bytes, prefix: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over all that decides what the tail of a conversation holds.

    Args:
        fingerprint: the model's, 64 hex digits. namespace: whose conversation it is.
        tokens: all of the conversation, as little-endian int32 bytes.
        prefix: plain JSON values: what the tail stands behind.

    Raises:
        InvalidNamespace, InvalidKey: an argument that no tail can have.
    """
    fields = _framed(_TAIL_DOMAIN, *_owner(fingerprint, namespace), tokens, canonical_json(prefix))
    return hashlib.sha256(b"".join(fields)).hexdigest()


def sample_sha256(documents: Iterable[TokenIds]) -> str:
    """SHA-256 (hex) over each document's token ids, in order, each preceded by its length in bytes.

    Raises:
        InvalidKey: as `token_bytes`.
    """
    digest = hashlib.sha256()
    for document in documents:
        for part in _framed(token_bytes(document)):
            digest.update(part)
    return digest.hexdigest()


def joined_block_hashes(fingerprint: str, namespace: str, tokens: bytes) -> bytes:
    """A running digest after each full block of 64 tokens: equal digests mean equal prefixes up to there.

    Args:
        tokens: ids as little-endian int32 bytes (`token_bytes`).

    Returns:
        One digest of 8 bytes after the other; the first bit of each is 0 (catalog members rely on it).
    """
    running = hashlib.sha256(b"".join(_framed(_BLOCK_DOMAIN, *_owner(fingerprint, namespace))))
    size = 4 * BLOCK_TOKENS
    hashes = []
    for start in range(0, len(tokens) - size + 1, size):
        running.update(tokens[start : start + size])
        hashes.append(running.digest()[:DIGEST_BYTES])
    joined = bytearray(b"".join(hashes))
    joined[::DIGEST_BYTES] = joined[::DIGEST_BYTES].translate(_WITHOUT_FIRST_BIT)
    return bytes(joined)


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """One byte string for equal JSON values: sorted keys, no spaces, whole floats as integers.

    Raises:
        InvalidKey: a value that JSON cannot hold (NaN and infinity included).
    """
    try:
        text = json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidKey(f"the settings are not plain JSON: {error}") from None
    return text.encode("ascii")


def _whole(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys must be strings")
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value


def _owner(fingerprint: str, namespace: str) -> tuple[bytes, bytes]:
    if not _SHA256.fullmatch(fingerprint):
        raise InvalidKey(f"model fingerprint {fingerprint!r} is not 64 lower-case hex digits")
    return fingerprint.encode("ascii"), check_namespace(namespace).encode("ascii")


def _framed(*fields: bytes) -> list[bytes]:
    """Each field after its length in 8 bytes, so that no two lists of fields make the same bytes."""
    return [part for field in fields for part in (len(field).to_bytes(8, "little"), field)]
