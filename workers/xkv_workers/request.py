"""What a run of precompute was asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from xkv_artifacts.keys import check_namespace
from xkv_artifacts.retention import NO_PROMISE
from xkv_service.errors import InvalidSpec
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.errors import CorpusError
from xkv_workers.low_fidelity import OnLow

_PROMPT_BYTES = 2**20


@dataclass(frozen=True)
class Request:
    """One run. The fields are the options of `xkv precompute`.

    Args:
        paths: files and folders. model: None is the bundled one. system_prompt: its text.
        redis_url: None is the embedded one. workers: None leaves the number to the machine.
        on_low_fidelity: None is "retry" with a calibration, "keep" without.
        pin, ttl_s: of the run's artifacts, those that are stored already included; as `ArtifactStore.pin`
            and `set_ttl`, from the moment on when they are published. None: no end of their own.
        parts: measure parts of what is computed, so that a server may answer from one; with a
            calibration's bases alone.
    """

    paths: tuple[Path, ...]
    store_url: str
    compression: CompressionOptions = CompressionOptions()
    model: str | None = None
    revision: str | None = None
    redis_url: str | None = None
    system_prompt: str | None = None
    template: Literal["chat", "raw"] = "chat"
    namespace: str = "default"
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ray_address: str | None = None
    min_fidelity: float = 0.0
    on_low_fidelity: OnLow | None = None
    pin: bool = False
    ttl_s: float | None = None
    parts: bool = False

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        NO_PROMISE.with_ttl(self.ttl_s, now=0)
        if self.on_low_fidelity == "retry" and self.compression.rank_k is not None:
            raise InvalidSpec(
                "on_low_fidelity=retry halves the ratio, and ranks were given",
                hint="give a ratio instead, or keep or fail",
            )

    @classmethod
    def create(
        cls,
        *,
        system_prompt: Path | None = None,
        **options: Any,
    ) -> Request:
        """From the options as given.

        Raises:
            InvalidSpec, InvalidNamespace, InvalidLimits, CorpusError: a value that no run can have.
        """
        names = [field.name for field in fields(CompressionOptions) if field.name in options]
        compression = CompressionOptions(**{name: options.pop(name) for name in names})
        prompt = None if system_prompt is None else read_prompt(system_prompt)
        return cls(compression=compression, system_prompt=prompt, **options)


def read_prompt(path: Path) -> str:
    """The system prompt in a file.

    Raises:
        CorpusError: it cannot be read, or is no text that a prompt can be.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_PROMPT_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(f"system prompt {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CorpusError(f"system prompt {path} is not UTF-8", hint="save it as UTF-8 text") from None
    if len(content) > _PROMPT_BYTES or "\0" in text or not text.strip():
        raise CorpusError(f"system prompt {path} is empty, binary or larger than 1 MiB")
    return text
