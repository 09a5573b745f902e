"""Which caches decode by the kernels of `xkv_service/kernels/`, and why others do not (docs/kernels.md)."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.scoring import LandmarkScorer, Scoring, SketchScorer
from xkv_service.kernels.probe import no_memory, passes, try_attention

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache

VARIABLE = "XKV_DECODE_KERNELS"
"""Environment variable that turns the kernels off, with the value "off"."""
DEVICES: tuple[str, ...] = () if os.environ.get(VARIABLE) == "off" else ("cuda",)
"""Kinds of device that kernels run on; tests add the CPU, where Triton interprets them."""
COMPILE_VARIABLE = "XKV_DECODE_COMPILE"
"""Environment variable that leaves a step's CUDA graph uncompiled, with the value "off"."""
COMPILES = os.environ.get(COMPILE_VARIABLE) != "off"
"""Whether norms and rotary embedding of a step's graph are compiled: 2 ms a step less, 8.5 s to start."""
MOST_TOKENS = 128
"""New tokens of a question that kernels take at once, each as a session: buffers grow with them."""
_CAPABILITY = (8, 0)
"""Kernels copy asynchronously and multiply bfloat16, which older devices do not."""
_SHARED_MEMORY = 160 * 1024
"""Bytes a program may share: their tiles need up to 122 KiB. Devices with 99 KiB have run none of them."""
_HEAD_BYTES = 256
"""Of a head's key or value: tiles of wider ones do not fit into shared memory."""
_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_run(device: torch.device) -> bool:
    """Whether Triton and a device that the kernels were made for are there."""
    if device.type not in DEVICES or not _has_triton():
        return False
    return device.type != "cuda" or (_is_able(device) and passes(try_attention, device))


def turned_off(error: Exception) -> bool:
    """Whether an error is Triton's: kernels do not compile or launch here, and none runs from now on."""
    global DEVICES
    if no_memory(error):
        return False
    if type(error).__module__.split(".")[0] != "triton" and not str(error).startswith("Triton Error"):
        return False
    _log.error("decoding without kernels from now on: one of them does not run (%s)", error)
    DEVICES = ()
    return True


def why_not(cache: XKVCache, scoring: Scoring) -> str | None:
    """Why new tokens of a cache cannot run by kernels, or None where they can.

    Either all compressed layers of a cache run by kernels or none does: layers take each other's choices.
    """
    if not kernels_run(cache.prefix.model.device):
        return f"{VARIABLE} is off, or Triton or a device that kernels run on is missing"
    if not takes(scoring):
        return "scores have a softcap, or sinks of their own"
    if cache.selection.granularity != "layer":
        return "every KV head chooses for itself"
    for index in cache.prefix.compressed:
        reason = _why_not_layer(cache.layers[index])
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def takes(scoring: Scoring) -> bool:
    """Whether kernels make scores of products like this."""
    return scoring.softcap is None and scoring.sinks is None


def is_interleaved(turns: Turns) -> bool | None:
    """Whether planes are dimensions 2 i and 2 i + 1, or not (i and i + D / 2); None: another way to turn."""
    planes = turns.table.planes
    place = torch.arange(len(planes))
    if torch.equal(planes, torch.stack([place, place + len(planes)], 1)):
        return False
    return True if torch.equal(planes, torch.stack([2 * place, 2 * place + 1], 1)) else None


def _why_not_layer(layer: Any) -> str | None:
    selection = getattr(layer, "selection", None)
    if selection is None:
        return "it is still being read"
    prefix = selection.prefix
    if not isinstance(prefix, LayerPrefix):
        return "its attention is latent, or a part of its tail is folded"
    if not selection.reuses:
        if selection.dense:
            return "all its tokens are attended to"
        scorer = selection.scorer
        if isinstance(scorer, SketchScorer) and scorer.planes.shape[1] % 2:
            return "its key sketch has an odd number of planes"
        if not isinstance(scorer, SketchScorer | LandmarkScorer):
            return "its tokens are chosen neither by a key sketch nor by landmarks"
    if prefix.dtype not in _DTYPES:
        return f"products are of {prefix.dtype}"
    for size in (prefix.head_dim, prefix.value_bases.shape[2]):
        if size < 32 or size & (size - 1) or size * prefix.dtype.itemsize > _HEAD_BYTES:
            return f"its heads have {size} dimensions of {prefix.dtype}"
    if 2 * len(prefix.turns.table.planes) != prefix.head_dim or is_interleaved(prefix.turns) is None:
        return "its keys are not turned whole, or in an unusual order"
    return None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _is_able(device: torch.device) -> bool:
    if torch.version.cuda is None:
        return False  # ROCm calls its devices cuda too; the kernels have instructions of NVIDIA's
    properties: Any = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return (properties.major, properties.minor) >= _CAPABILITY and shared >= _SHARED_MEMORY
