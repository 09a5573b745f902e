"""Keys, values and derived sketches from docs/format.md alone, with the standard library alone."""

from __future__ import annotations

import math
import struct
from typing import Any

_Tensor = tuple[str, list[int], bytes]
_Tensors = dict[str, _Tensor]
_File = tuple[dict[str, Any], _Tensors]
_Rows = list[list[float]]

FORMATS = {"U8": "B", "I8": "b", "I16": "h", "I32": "i", "F16": "e", "F32": "f", "F64": "d"}


class Prefix:
    """One prefix.

    Args:
        file: its manifest and tensors. calibration: those of the calibration whose bases it shares.
    """

    def __init__(self, file: _File, calibration: _File | None = None) -> None:
        self.manifest, self._tensors = file
        self._calibration = None
        spec = self.manifest["spec"]
        assert ("calibration" in spec) == ("basis" in spec)
        if spec.get("basis") == "calibrated":
            assert calibration is not None
            assert calibration[0]["id"] == spec["calibration"]
            assert calibration[0]["model"]["fingerprint"] == self.manifest["model"]["fingerprint"]
            self._calibration = calibration

    def keys(self, layer: int) -> _Rows:
        """Before RoPE, a token's heads side by side."""
        return self._with_exact(self._product(layer, "key"), layer, "keys")

    def values(self, layer: int) -> _Rows:
        return self._with_exact(self._product(layer, "value"), layer, "values")

    def turned(self, keys: _Rows, layer: int) -> _Rows:
        """Keys after RoPE."""
        number, place = self._locate(layer)
        group = self.manifest["groups"][number]
        name, heads = f"rotary.{group['rotary'][place]}", group["kv_heads"][place]
        dim = group["key_widths"][place] // heads
        planes = rows(self._tensors[f"{name}.planes"])
        turned = []
        for position, key in enumerate(keys):
            row = list(key)
            turns = zip(planes, *self._cos_sin(name, position), strict=True)
            for (first, second), cos, sin in turns:
                for x, y in ((h * dim + int(first), h * dim + int(second)) for h in range(heads)):
                    row[x], row[y] = key[x] * cos - key[y] * sin, key[y] * cos + key[x] * sin
            turned.append(row)
        return turned

    def derived_sketch(self, layer: int) -> tuple[list[int], list[float]]:
        """Codes and scales, of the keys as the factors alone give them."""
        keys = self.turned(self._product(layer, "key"), layer)
        planes = rows(self._tensors[f"layer.{layer}.sketch.planes"])
        dim = len(keys[0]) // len(planes)
        codes, scales = [], []
        for key in keys:
            for head, dims in enumerate(planes):
                picked = [_f32(key[head * dim + int(one)]) for one in dims]
                scale = _f16(min(_f32(max(map(abs, picked)) / 7), 65504.0))
                step = scale or 2.0**-126
                levels = [round(max(-7.0, min(7.0, _f32(one / step)))) + 8 for one in picked]
                codes += [low | high << 4 for low, high in zip(levels[::2], levels[1::2], strict=True)]
                scales.append(scale)
        return codes, scales

    def _locate(self, layer: int) -> tuple[int, int]:
        for number, group in enumerate(self.manifest["groups"]):
            if layer in group["layers"]:
                return number, group["layers"].index(layer)
        raise KeyError(layer)

    def _product(self, layer: int, kind: str) -> _Rows:
        number, place = self._locate(layer)
        widths = self.manifest["groups"][number][f"{kind}_widths"]
        first, last = sum(widths[:place]), sum(widths[: place + 1])
        columns = list(zip(*(row[first:last] for row in self._bases(number, kind)), strict=True))
        factors = self._factors(number, kind)
        return [[sum(map(_times, row, column)) for column in columns] for row in factors]

    def _factors(self, number: int, kind: str) -> _Rows:
        group = self.manifest["groups"][number]
        columns = f"columns_{kind[0]}"
        assert (columns in group) == ("calibration" in self.manifest["spec"])
        runs = group.get(columns, [[0, group[f"rank_{kind[0]}"]]])
        sizes = [(bits, min(64, count - start)) for bits, count in runs for start in range(0, count, 64)]
        whole: _Rows = [[] for _ in range(self.manifest["tokens"])]
        for block, (bits, count) in enumerate(sizes):
            stored = self._tensors[f"group.{number}.{kind}.factors.{block}"]
            width = -(-count * bits // 8) if bits in (2, 4) else count
            assert stored[1] == [len(whole), width] and (
                not bits or stored[0] == ("I8" if bits == 8 else "U8")
            )
            for row, more in zip(whole, rows(stored), strict=True):
                row += unpacked(more, bits, count) if bits in (2, 4) else more
        assert all(len(row) == group[f"rank_{kind[0]}"] for row in whole)
        return whole

    def _bases(self, number: int, kind: str) -> _Rows:
        name = f"group.{number}.{kind}"
        if self._calibration is None:
            blocks = sum(1 for one in self._tensors if one.startswith(f"{name}.bases."))
            found = [row for block in range(blocks) for row in rows(self._tensors[f"{name}.bases.{block}"])]
            if self.manifest["spec"].get("base_dtype") is None:
                return found
            scales = numbers(self._tensors[f"{name}.scales"])
            return [[scale * one for one in row] for scale, row in zip(scales, found, strict=True)]
        manifest, tensors = self._calibration
        theirs = manifest["groups"].index(self.manifest["groups"][number]["layers"])
        scales = numbers(self._tensors[f"{name}.scales"])
        bases = rows(tensors[f"group.{theirs}.{kind}.bases"])[: len(scales)]
        return [[scale * one for one in row] for scale, row in zip(scales, bases, strict=True)]

    def _with_exact(self, found: _Rows, layer: int, kind: str) -> _Rows:
        if f"layer.{layer}.exact.positions" in self._tensors:
            positions = numbers(self._tensors[f"layer.{layer}.exact.positions"])
            exact = rows(self._tensors[f"layer.{layer}.exact.{kind}"])
            for position, row in zip(positions, exact, strict=True):
                found[int(position)] = row
        return found

    def _cos_sin(self, name: str, position: int) -> tuple[list[float], list[float]]:
        if self._tensors[f"{name}.planes"][1][0] == 0:
            return [], []
        if f"{name}.inv_freq" not in self._tensors:
            cos, sin = (rows(self._tensors[f"{name}.{one}"])[position] for one in ("cos", "sin"))
            return cos, sin
        (scaling,) = numbers(self._tensors[f"{name}.scaling"])
        rounded = (_f32, _bf16, _f16)[int(numbers(self._tensors[f"{name}.rounding"])[0])]
        angles = [_f32(position * one) for one in numbers(self._tensors[f"{name}.inv_freq"])]
        made = [[rounded(_f32(turn(one)) * scaling) for one in angles] for turn in (math.cos, math.sin)]
        return made[0], made[1]


def numbers(tensor: _Tensor) -> list[float]:
    """All numbers of a tensor, in order."""
    dtype, _, data = tensor
    if dtype == "BF16":
        data, dtype = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2)), "F32"
    return [one for (one,) in struct.iter_unpack("<" + FORMATS[dtype], data)]


def rows(tensor: _Tensor) -> _Rows:
    """The numbers of each first index."""
    flat, count = numbers(tensor), tensor[1][0]
    width = len(flat) // count if count else 0
    return [flat[at * width : (at + 1) * width] for at in range(count)]


def unpacked(packed: list[float], bits: int, columns: int) -> list[float]:
    """The odd integers of one row of a block."""
    row = sum(int(byte) << (8 * place) for place, byte in enumerate(packed))
    codes = [row >> (bits * column) & (2**bits - 1) for column in range(columns)]
    return [2.0 * code + 1 - 2**bits for code in codes]


def _times(x: float, y: float) -> float:
    return x * y


def _f32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _f16(number: float) -> float:
    return float(struct.unpack("<e", struct.pack("<e", number))[0])


def _bf16(number: float) -> float:
    (whole,) = struct.unpack("<I", struct.pack("<f", number))
    nearest = whole + 0x7FFF + (whole >> 16 & 1) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", nearest))[0])
