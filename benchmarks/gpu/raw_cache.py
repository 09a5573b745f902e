"""A whole cache as one safetensors file, and two plain ways to load it: nothing is checked."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from xkv_artifacts.positioned import PositionedFile
from xkv_artifacts.read_ahead import read_ahead

_PIECE = 16 << 20


class RawCache:
    """One document's.

    Args:
        path: of the file that is written. cache: its keys and values [1, kv_heads, T, D] by layer.
    """

    def __init__(self, path: Path, model: PreTrainedModel, cache: DynamicCache) -> None:
        self.path, self._model = path, model
        tensors = {}
        for number, layer in enumerate(cache.layers):
            tensors[f"{number}.key"] = layer.keys[0].contiguous().cpu()
            tensors[f"{number}.value"] = layer.values[0].contiguous().cpu()
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path)

    def by_safetensors(self) -> DynamicCache:
        """`safetensors.torch.load_file` to the device."""
        return self._cache(load_file(self.path, device=str(self._model.device)))

    def by_threads(self, threads: int) -> DynamicCache:
        """Pieces read by threads into pinned memory, and copied while others are read."""
        device = self._model.device
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            source, start = PositionedFile(file), 8 + length
            names = sorted(name for name in header if name != "__metadata__")
            made = {
                name: torch.empty(header[name]["shape"], dtype=torch.bfloat16, device=device)
                for name in names
            }
            copying = torch.cuda.Stream(device) if device.type == "cuda" else None

            def job(name: str, first: int) -> None:
                begin, end = header[name]["data_offsets"]
                size = min(_PIECE, end - begin - first)
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=copying is not None)
                source.fill(buffer.numpy().data, start + begin + first, name)
                with torch.cuda.stream(copying):
                    target = made[name].view(torch.uint8).flatten()[first : first + size]
                    target.copy_(buffer, non_blocking=True)

            parts = (
                [
                    lambda name=name, first=first: job(name, first)
                    for first in range(0, made[name].nbytes, _PIECE)
                ]
                for name in names
            )
            for _ in read_ahead(parts, threads):
                pass
            if copying is not None:
                copying.synchronize()
        return self._cache(made)

    def _cache(self, tensors: dict[str, torch.Tensor]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        for number, layer in enumerate(cache.layers):
            keys, values = tensors[f"{number}.key"][None], tensors[f"{number}.value"][None]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache
