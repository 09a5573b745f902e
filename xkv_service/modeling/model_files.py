"""A model's files: found on disk or on the hub, and read without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, AutoTokenizer

from xkv_artifacts.errors import first_line
from xkv_artifacts.fingerprint import digest_model, fingerprint_files
from xkv_artifacts.manifest import ModelIdentity
from xkv_service.errors import InvalidSpec, ModelNotFound
from xkv_service.modeling.device import DTYPES, resolve_device, resolve_dtype
from xkv_service.modeling.layout import ModelLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What Transformers raises for a config that cannot be: each model type checks, or computes, in its own way.
_BAD_CONFIG = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    StrictDataclassError,
)
# What a checkpoint needs to be loaded by Transformers from safetensors; never pickles, never code.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")

_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**24,
    "num_attention_heads": 2**16,
    "vocab_size": 2**28,
}
"""Fields of a config, and the most that is tried: each layer is made, if only of shapes, to be understood."""


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """A model folder with config, weights in safetensors and tokenizer; no weight is loaded.

    Args:
        path: the folder.
        name: how people call it: the hub's name, or the folder's.
        dtype: what the model is to run in.
        device: where the model is to run.
    """

    path: Path
    name: str
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def config(self) -> Any:
        """The model's Transformers config."""
        return read_config(self.path, self.name)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Who the model is, fingerprint included (reads every weight file the first time on a machine)."""
        architectures = getattr(self.config, "architectures", None) or [self.config.model_type]
        dtype = str(self.dtype).removeprefix("torch.")
        fingerprint, parts = digest_model(self.path, dtype=dtype)
        return ModelIdentity(
            fingerprint=fingerprint, name=self.name, architecture=architectures[0], dtype=dtype, parts=parts
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ModelNotFound: the folder has none that Transformers reads.
        """
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelNotFound(
                f"{self.name} has no tokenizer that can be loaded: {first_line(error)}",
                hint="put tokenizer.json and tokenizer_config.json beside the weights",
            ) from error

    @cached_property
    def layout(self) -> ModelLayout:
        """The layout of the model's cache, from its config alone.

        Raises:
            UnsupportedModel: the cache cannot be compressed.
            ModelNotFound: Transformers has no causal language model for the config.
        """
        from transformers import AutoModelForCausalLM

        from xkv_service.modeling.inspect import inspect_model

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=self.dtype, trust_remote_code=False
                )
        except _BAD_CONFIG as error:
            raise ModelNotFound(
                f"{self.name} is no causal language model of this Transformers: {first_line(error)}",
                hint="use a decoder-only language model that Transformers supports without remote code",
            ) from error
        return inspect_model(model)

    @property
    def context_window(self) -> int | None:
        """Most tokens the model can take, or None when its config does not say."""
        return context_window(self.config)


def find_model(
    name_or_path: str | Path, revision: str | None = None, *, dtype: str = "auto", device: str = "auto"
) -> ModelFiles:
    """Find a model's files by folder or hub name (downloaded into the hub's cache when missing).

    Args:
        name_or_path: a folder, or a name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU) or one of float32, bfloat16, float16.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ModelNotFound: no such model or revision, which a folder has none of, or it has no weights in
            safetensors.
        DeviceUnavailable: that device is not here.
        InvalidSpec: an unknown dtype.
    """
    target = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidSpec(f"dtype={dtype!r} is unknown", hint=f"use auto or one of {', '.join(DTYPES)}")
    folder = _folder(name_or_path)
    if folder is not None and revision is not None:
        raise ModelNotFound(
            f"model {folder} has no revision {revision!r}: a folder has no revisions",
            hint="leave the revision out, or give the model's name on the hub",
        )
    path = folder or _snapshot(str(name_or_path), revision)
    name = str(name_or_path) if folder is None else path.resolve().name
    _refuse_without_safetensors(path, name)
    return ModelFiles(path, name, resolve_dtype(read_config(path, name), dtype, target), target)


def fingerprint_of(model: PreTrainedModel, dtype: str) -> str | None:
    """The fingerprint, in a dtype, of the files that a model was loaded from; None where there are none."""
    files = _files_of(model)
    return None if files is None else fingerprint_files(files.path, dtype=dtype)


def identity_of(model: PreTrainedModel) -> ModelIdentity | None:
    """Who a loaded model is, by the files that it was loaded from; None where there are none."""
    files = _files_of(model)
    return None if files is None else replace(files, dtype=model.dtype).identity


def _files_of(model: PreTrainedModel) -> ModelFiles | None:
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    # Some versions of Transformers note the commit of folders in the hub's cache, too.
    commit = None if Path(name).is_dir() else getattr(model.config, "_commit_hash", None)
    try:
        return find_model(name, commit, device="cpu")
    except ModelNotFound:
        return None


def read_config(path: Path, name: str) -> Any:
    """The config in the folder of the model called `name`.

    Raises:
        ModelNotFound: there is none that Transformers reads without remote code, or a size no model can have.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except _BAD_CONFIG as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
        raise ModelNotFound(
            f"{name} has no config that Transformers can read: {first_line(cause or error)}",
            hint="mend it, or use a model type that Transformers itself supports: remote code is never run",
        ) from error
    _refuse_sizes(config, name)
    return config


def _refuse_sizes(config: Any, name: str) -> None:
    """Transformers checks what kind of value a size is, not whether a model can have it."""
    decoder = config.get_text_config(decoder=True)
    for field, most in _SIZES.items():
        value = getattr(decoder, field, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise ModelNotFound(
                f"{name}: config.json says {field}={value}", hint=f"no model has that: 1 to {most:,}"
            )


def context_window(config: Any) -> int | None:
    """Most tokens a model of this config can take, or None when it does not say."""
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _folder(name_or_path: str | Path) -> Path | None:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"the folder {path} has no config.json", hint="give the folder that holds the model's weights"
            )
        return path
    if str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") > 1 or path.exists():
        raise ModelNotFound(f"no model folder at {path}", hint="give a folder with config.json and weights")
    return None


def _snapshot(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except HFValidationError:
        problem, hint = "is no valid model name", "give a folder, or a name such as org/model"
    except GatedRepoError:
        problem, hint = "needs permission on the hub", "ask for access there, or give a local folder"
    except RevisionNotFoundError:
        problem, hint = f"has no revision {revision!r}", "give a branch, tag or commit of the model"
    except RepositoryNotFoundError:
        problem, hint = "is not on the hub", "check the spelling, or give a local folder"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        problem = "is neither a folder here nor in the local cache, and the hub cannot be reached"
        hint = "check the spelling and the network, or give a local folder"
    raise ModelNotFound(f"model {name!r} {problem}", hint=hint) from None


def _refuse_without_safetensors(path: Path, name: str) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelNotFound(
            f"{name} has pickled weights only, which can run code when loaded",
            hint="save it again with save_pretrained, which writes safetensors",
        )
    raise ModelNotFound(f"{name} has no weights in safetensors", hint="download the model's weights first")
