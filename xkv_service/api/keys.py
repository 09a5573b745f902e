"""`KeyRing`: who may use the server, whose prefixes they see, and how much they may ask for at once."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.errors import InvalidNamespace, XKVError, first_line
from xkv_artifacts.keys import check_namespace
from xkv_service.api.validation_words import wrong

KEYS_VARIABLE = "XKV_API_KEYS"
"""Environment variable that holds what a keys file would."""

OPEN_NAMESPACE = "default"


def _namespace(name: str) -> str:
    try:
        return check_namespace(name)
    except InvalidNamespace as error:
        raise ValueError(f"{error.message}: {error.hint}") from None


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name, re.ASCII):
        raise ValueError("a name is 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _digest(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest, re.ASCII):
        raise ValueError('not 64 hexadecimal digits, as `printf %s "$KEY" | sha256sum` prints them')
    return digest


class KeysError(XKVError):
    """A keys file that cannot be read."""


class Limits(BaseModel):
    """What one key may have under way at once, in one server process.

    Args:
        requests: being answered, or sending their bodies. prompt_tokens: of their prompts together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int = Field(default=64, ge=1)
    prompt_tokens: int = Field(default=2**20, ge=1)


class Key(BaseModel):
    """One bearer key.

    Args:
        name: for logs, never secret. sha256: of the key, 64 hex digits.
        namespace: whose prefixes it makes and uses.
        write_public: may make, change and delete prefixes that everybody uses; without it nobody does, not
            even a key whose own namespace is the public one.
        operator: may read /metrics and the status of all namespaces.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_name)]
    sha256: Annotated[str, AfterValidator(_digest)]
    namespace: Annotated[str, AfterValidator(_namespace)]
    write_public: bool = False
    operator: bool = False
    limits: Limits = Limits()


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Annotated[tuple[Key, ...], Field(min_length=1)]


_ANYBODY = Key(name="anybody", sha256="0" * 64, namespace=OPEN_NAMESPACE, write_public=True, operator=True)


class KeyRing:
    """All keys; without any, everybody who may connect is the one of the namespace "default"."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self.keys = keys

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self.keys

    @classmethod
    def read(cls, path: Path | None = None) -> KeyRing:
        """The keys in a JSON file, else those in the environment (`KEYS_VARIABLE`), else none.

        Raises:
            KeysError: there are some, but they cannot be read.
        """
        if path is not None:
            try:
                return cls._parsed(path.read_text("utf-8"), str(path))
            except OSError as error:
                raise KeysError(
                    f"the keys file {path} cannot be read: {error.strerror or first_line(error)}",
                    hint="give a file that whoever starts the server may read",
                ) from None
            except UnicodeDecodeError as error:
                raise KeysError(
                    f"the keys file {path} cannot be read: {first_line(error)}", hint="save it as UTF-8"
                ) from None
        text = os.environ.get(KEYS_VARIABLE)
        return cls() if text is None else cls._parsed(text, KEYS_VARIABLE)

    @classmethod
    def _parsed(cls, text: str, source: str) -> KeyRing:
        try:
            keys = _KeysFile.model_validate_json(text).keys
        except ValidationError as error:
            raise _not_keys(source, error) from None
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in keys]
            if len(set(values)) < len(values):
                raise KeysError(f"{source}: two keys have the same {field}")
        for key in keys:
            if key.sha256 == hash_key(""):
                raise KeysError(
                    f"{source}: the sha256 of key {key.name} is the digest of an empty key",
                    hint='see that KEY is set where you run `printf %s "$KEY" | sha256sum`',
                )
        return cls(keys)

    def find(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header, or None. Every key is compared, each in constant time; an empty
        one is none.
        """
        if self.is_open:
            return _ANYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        given = hash_key(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(given, key.sha256):
                found = key
        return found if secret and scheme.lower() == "bearer" else None


def _not_keys(source: str, error: ValidationError) -> KeysError:
    """The first thing that is wrong; no value is told, which may be a key."""
    first = error.errors(include_url=False, include_input=False)[0]
    hint = 'use {"keys": [{"name": ..., "sha256": ..., "namespace": ...}]}'
    if first["type"] == "json_invalid":
        return KeysError(f"{source} is not JSON: {first['ctx']['error']}", hint=hint)
    place = ".".join(map(str, first["loc"]))
    return KeysError((f"{source}: {place}" if place else source) + wrong(first), hint=hint)


def hash_key(secret: str) -> str:
    """SHA-256 (hex) of a key, as a keys file holds it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
