"""Load models and tokenizers: local folders and hub names, safetensors only, never remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from xkv_artifacts.errors import first_line
from xkv_artifacts.manifest import ModelIdentity
from xkv_service.errors import ModelNotFound
from xkv_service.modeling.device import DTYPES, resolve_device, resolve_dtype
from xkv_service.modeling.model_files import ModelFiles, context_window, find_model

__all__ = [
    "DTYPES",
    "LoadedModel",
    "ModelFiles",
    "context_window",
    "find_model",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on its device, its tokenizer, and who it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity

    @property
    def context_window(self) -> int | None:
        """Most tokens the model can take, or None when its config does not say."""
        return context_window(self.model.config)


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Arguments and errors as `find_model`."""
    return find_model(name_or_path, revision, device="cpu").tokenizer


def load_model(
    name_or_path: str | Path, revision: str | None = None, *, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """Load a model for inference.

    Args:
        name_or_path, revision, dtype, device: as `find_model`.

    Raises:
        ModelNotFound: no such model, or its weights do not fit its config.
        DeviceUnavailable: that device is not here.
        InvalidSpec: an unknown dtype.
    """
    files = find_model(name_or_path, revision, dtype=dtype, device=device)
    identity = files.identity
    with _quiet_transformers():
        model = _load_weights(files)
    return LoadedModel(model, files.tokenizer, identity)


def _load_weights(files: ModelFiles) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            files.path,
            config=files.config,
            dtype=files.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelNotFound(
            f"{files.name} cannot be loaded: {first_line(error)}",
            hint="check that the folder holds a complete causal language model in safetensors",
        ) from error
    _refuse_incomplete(files, info)
    return model.to(files.device).eval()


def _refuse_incomplete(files: ModelFiles, info: dict[str, Any]) -> None:
    """Transformers fills missing weights with random numbers and only warns."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelNotFound(
            f"{files.name} lacks {len(missing)} weights, the first is {missing[0]}",
            hint="the checkpoint is incomplete or belongs to another architecture",
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings on the terminal while weights load: the command draws its own."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
