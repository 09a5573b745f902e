"""The model of a run, as the driver needs it: its files, tokenizer and layout, no weights loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xkv_service.demo import demo_model_path
from xkv_service.modeling.device import resolve_device, resolve_dtype
from xkv_service.modeling.layout import ModelLayout
from xkv_service.modeling.model_files import ModelFiles, find_model
from xkv_service.modeling.prompts import check_template, render_prefix
from xkv_workers.cluster import Room
from xkv_workers.messages import Device

SMALL_BYTES = 256 * 2**20
"""Weights on disk up to which a machine gets several workers; in memory they can take twice as much."""


@dataclass(frozen=True)
class ChosenModel:
    """One model on one kind of device.

    Args:
        place: what workers load: an absolute folder, or a name on the hub.
        dtype: what it runs in; it is part of the fingerprint.
    """

    place: str
    device: Device
    dtype: str
    files: ModelFiles

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config, weights and dtype: what an artifact is made with."""
        return self.files.identity.fingerprint

    @property
    def layout(self) -> ModelLayout:
        """The layout of the model's cache; raises UnsupportedModel when it cannot be compressed."""
        return self.files.layout

    @property
    def context_window(self) -> int | None:
        """Most tokens the model can take, or None when its config does not say."""
        return self.files.context_window

    @property
    def is_small(self) -> bool:
        """Several copies fit into any machine's memory."""
        return sum(path.stat().st_size for path in self.files.path.glob("*.safetensors")) <= SMALL_BYTES

    def check_template(self, *, system_prompt: str | None, template: Literal["chat", "raw"]) -> None:
        """Refuse once what would fail for each document.

        Raises:
            InvalidPrompt: there is no chat template, or one that cannot carry such chats.
        """
        check_template(self.files.tokenizer, system_prompt=system_prompt, template=template)

    def render(
        self, document: str, *, system_prompt: str | None, template: Literal["chat", "raw"]
    ) -> Sequence[int]:
        """Token ids of the prefix that every chat about the document begins with."""
        return render_prefix(self.files.tokenizer, document, system_prompt=system_prompt, template=template)


def choose_model(name: str | None, revision: str | None, device: Device) -> ChosenModel:
    """Find a model (None is the bundled one) and see that it can be compressed, and has a tokenizer.

    Raises:
        ModelNotFound, UnsupportedModel
    """
    wanted = str(demo_model_path()) if name is None else name
    files = find_model(wanted, revision, device="cpu")
    # The driver may have no GPU where the workers do; the dtype must be the workers' all the same.
    dtype = str(resolve_dtype(files.config, "auto", torch.device(device))).removeprefix("torch.")
    files = find_model(wanted, revision, dtype=dtype, device="cpu")
    place = str(files.path.resolve()) if Path(wanted).expanduser().is_dir() else wanted
    chosen = ChosenModel(place, device, dtype, files)
    chosen.layout, chosen.files.tokenizer  # noqa: B018 - raise before anything is started
    return chosen


def choose_device(device: Literal["auto", "cpu", "cuda"], room: Room | None) -> Device:
    """Where the workers' model runs: as asked, else on GPUs when the cluster (or this machine) has any.

    Raises:
        DeviceUnavailable: a GPU is asked for and this machine, which is all there is, has none.
    """
    if room is not None:
        return "cuda" if device == "cuda" or (device == "auto" and room.gpus) else "cpu"
    return "cuda" if resolve_device(device).type == "cuda" else "cpu"
