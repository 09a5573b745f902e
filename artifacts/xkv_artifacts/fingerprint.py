"""A model's fingerprint: SHA-256 over every file that can change what the model computes, and the dtype."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from xkv_artifacts.errors import ModelFilesError
from xkv_artifacts.manifest import ModelParts

_DOMAIN = b"xkv-model-fingerprint-1"
_CHUNK = 8 << 20
_CACHED_FROM_BYTES = 1 << 20
_SETTLED_SECONDS = 2.0

# Only what cannot change a key or a value is left out: papers, pictures, sampling defaults, the state of a
# training run, and weights in formats that Transformers does not load by itself. Anything unknown counts.
_PAPERS = ("*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.pdf")
_PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg")
_TRAINING = ("optimizer.*", "scheduler.*", "trainer_state.json", "training_args.bin", "rng_state*.pth")
_FOREIGN = ("*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.h5", "*.msgpack", "*.ot")
_IRRELEVANT = (*_PAPERS, *_PICTURES, *_TRAINING, *_FOREIGN, "generation_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")

# To say which part of two models differs; what is neither weights nor tokenizer goes with the config.
_WEIGHT_FILES = (*_WEIGHTS, "*.safetensors.index.json", "*.bin.index.json")
_TOKENIZER_FILES = (
    *("tokenizer*", "*.tiktoken", "*.model", "vocab*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "additional_chat_templates/*"),
)


def fingerprint_files(model_dir: str | Path, *, dtype: str, cache_dir: str | Path | None = None) -> str:
    """Fingerprint the model in `model_dir` as it is computed in `dtype`.

    Arguments and errors as `digest_model`.

    Returns:
        64 hex digits.
    """
    return digest_model(model_dir, dtype=dtype, cache_dir=cache_dir)[0]


def digest_model(
    model_dir: str | Path, *, dtype: str, cache_dir: str | Path | None = None
) -> tuple[str, ModelParts]:
    """The fingerprint of the model in `model_dir` as it is computed in `dtype`, and digests of its parts.

    Covers names and contents of the config, all weight files, tokenizer files and chat templates, in
    subfolders too. The folder's own name and place do not count. When in doubt it differs.

    Args:
        model_dir: a folder as `from_pretrained` takes it (links are followed).
        dtype: the dtype the model runs in, "bfloat16" or "torch.bfloat16".
        cache_dir: where digests of large files are kept, by path, size, times and inode; by default
            `xkv/digests` in the user's cache folder.

    Returns:
        64 hex digits, and those of each part, which say what differs where the fingerprint does.

    Raises:
        ModelFilesError: the folder is missing, unreadable, or has no config.json or no weights.
    """
    root = Path(model_dir)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        files = sorted(_relevant_files(root))
        _check_complete(root, files)
        fields = {name: [_encoded(name), _file_digest(root / name, cache)] for name in files}
    except OSError as error:
        raise ModelFilesError(f"cannot read model folder {root}: {error.strerror or error}") from None
    parts = {
        part: _framed([one for name in files if _part_of(name) == part for one in fields[name]])
        for part in ModelParts.model_fields
    }
    head = [_DOMAIN, dtype.removeprefix("torch.").encode()]
    return _framed([*head, *(one for name in files for one in fields[name])]), ModelParts(**parts)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _framed(fields: Iterable[bytes]) -> str:
    framed = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return hashlib.sha256(framed).hexdigest()


def _part_of(name: str) -> str:
    for part, patterns in (("weights", _WEIGHT_FILES), ("tokenizer", _TOKENIZER_FILES)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return part
    return "config"


def default_cache_dir() -> Path:
    """The user's cache folder for file digests (`XDG_CACHE_HOME` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xkv" / "digests"


def _relevant_files(root: Path) -> Iterator[str]:
    if not root.is_dir():
        raise ModelFilesError(f"{root} is not a folder", hint="give a folder with config.json and weights")
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            hidden = name.startswith(".")
            if not hidden and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _IRRELEVANT):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _check_complete(root: Path, files: list[str]) -> None:
    if "config.json" not in files:
        raise ModelFilesError(f"{root} has no config.json", hint="give the folder of a Transformers model")
    if not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in _WEIGHTS):
        raise ModelFilesError(f"{root} has no weight files", hint="download the model's weights first")


def _file_digest(path: Path, cache: Path) -> bytes:
    before = path.stat()
    record = cache / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
    # ctime catches a file that was changed in place and got its old mtime back.
    key = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev]
    large = before.st_size >= _CACHED_FROM_BYTES
    if large and (known := _read_record(record, key)) is not None:
        return known
    digest = _sha256_of(path)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ModelFilesError(
            f"{path} changed while it was read", hint="try again when the download is complete"
        )
    # A file changed just now could change again within the clock's granularity without showing it.
    if large and time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_SECONDS:
        _write_record(record, key, digest)
    return digest


def _sha256_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _read_record(record: Path, key: list[int]) -> bytes | None:
    """The cached digest, or None when there is none, it is another file's, or it is damaged."""
    try:
        content = json.loads(record.read_bytes())
        digest = bytes.fromhex(content["sha256"]) if content["key"] == key else b""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if len(digest) == hashlib.sha256().digest_size else None


def _write_record(record: Path, key: list[int], digest: bytes) -> None:
    """Keep a digest; a cache that cannot be written only costs the time to read the file again."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=record.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"key": key, "sha256": digest.hex()}, file)
        Path(name).replace(record)
    except OSError:
        return
