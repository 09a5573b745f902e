"""What lossless coding takes off stored artifacts, and how fast it is: bundled model, one CPU thread.

    python benchmarks/lossless.py --out benchmarks/results/lossless.json

Documents of `examples/corpus` and drawn ones, compressed as `xkv precompute` does it with the bundled
calibration at each ratio, and without one at 8x. Every file is coded as it lies on disk (`stored`), and again
with its bytes in another order: `columns` puts the bytes of one column of the token factors together, and all
first bytes of 16- and 32-bit numbers before the second ones. What a coder that counts each column's numbers
could take off at best is `entropy`.
"""

from __future__ import annotations

import argparse
import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import zstandard
from bundled import artifact_bytes, document_ids, load
from report import Report, command

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import compress
from xkv_service.demo import demo_calibration_path
from xkv_service.factors import LowRank, PrefixFactors
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.prompts import render_prefix
from xkv_service.packed_factors import PackedFactors, unpack

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
ORDERS = ("stored", "columns")


@dataclass(frozen=True)
class Coder:
    """A lossless coder of whole files."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]


def _zstd(level: int) -> Coder:
    return Coder(zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress)


CODERS = {
    "zlib 9": Coder(lambda data: zlib.compress(data, 9), zlib.decompress),
    "lzma 6": Coder(lambda data: lzma.compress(data, preset=6), lzma.decompress),
    **{f"zstd {level}": _zstd(level) for level in (1, 3, 9, 19)},
}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lossless.json"))
    parser.add_argument("--model", help="another model than the bundled one, with --calibration")
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded, calibration = load(arguments.model), read_calibration_file(arguments.calibration)
    report = Report("lossless", command(), "the file as it is stored")
    for ratio in (None, 8.0, 20.0, 32.0):
        for name, texts in (("corpus", _corpus(loaded)), ("drawn", _drawn(loaded))):
            _measure(
                report, name, ratio, [_factors(loaded, ids, ratio, calibration) for ids in texts], loaded
            )
    report.write(arguments.out)


def _corpus(loaded: LoadedModel) -> Iterator[torch.Tensor]:
    for path in sorted(CORPUS.iterdir()):
        yield torch.tensor(render_prefix(loaded.tokenizer, path.read_text("utf-8")))


def _drawn(loaded: LoadedModel) -> Iterator[torch.Tensor]:
    for seed, tokens in enumerate((1024, 2048, 4096, 8192)):
        yield document_ids(loaded, tokens, seed)


def _factors(
    loaded: LoadedModel, ids: torch.Tensor, ratio: float | None, calibration: Calibration
) -> PrefixFactors:
    if ratio is None:
        return compress(loaded.model, ids)
    return compress(loaded.model, ids, best_spec(ratio, calibration), calibration)


def _measure(
    report: Report, name: str, ratio: float | None, made: list[PrefixFactors], loaded: LoadedModel
) -> None:
    spec = "int8, own bases, 8x" if ratio is None else f"calibrated, {ratio:g}x"
    for order in ORDERS:
        files = [artifact_bytes(loaded, one, _ordered(one, order)) for one in made]
        total = sum(map(len, files))
        for coder_name, coder in CODERS.items():
            started = time.perf_counter()
            coded = [coder.encode(file) for file in files]
            encoded = time.perf_counter()
            decoded = [coder.decode(one) for one in coded]
            ended = time.perf_counter()
            assert decoded == files
            report.add(
                spec=spec,
                documents=f"{len(files)} {name}",
                order=order,
                coder=coder_name,
                bytes=total,
                coded=sum(map(len, coded)),
                **{"saved_%": 100 - 100 * sum(map(len, coded)) / total},
                encode_mb_s=total / 1e6 / (encoded - started),
                decode_mb_s=total / 1e6 / (ended - encoded),
            )
    stored = [artifact_bytes(loaded, one) for one in made]
    total, saved = sum(map(len, stored)), sum(map(_redundant_bytes, made))
    report.add(
        spec=spec,
        documents=f"{len(made)} {name}",
        coder="entropy",
        bytes=total,
        **{"saved_%": 100 * saved / total},
    )


def _pairs(factors: PrefixFactors) -> Iterator[LowRank]:
    for group in factors.groups:
        yield group.keys
        if group.values is not None:
            yield group.values


def _pieces(pair: LowRank) -> Iterator[tuple[torch.Tensor, int, int]]:
    """(stored numbers, bits, columns) of each run of columns."""
    if isinstance(pair.factors, PackedFactors):
        for piece, (bits, columns) in zip(pair.factors.pieces, pair.factors.runs, strict=True):
            yield piece, bits, columns
    else:
        yield pair.factors, 8, pair.factors.shape[1]


def _redundant_bytes(factors: PrefixFactors) -> float:
    """Bytes of the token factors beyond the entropy of each column's numbers."""
    saved = 0.0
    for pair in _pairs(factors):
        for piece, bits, columns in _pieces(pair):
            for column in unpack(piece, bits, columns).T:
                counts = column.long().add(128).bincount().double()
                shares = counts[counts > 0] / column.numel()
                saved += column.numel() * (bits + float((shares * shares.log2()).sum())) / 8
    return saved


def _ordered(factors: PrefixFactors, order: str) -> dict[str, torch.Tensor]:
    """The artifact's tensors, their bytes in another order."""
    tensors = factors.to_tensors()
    if order == "stored":
        return tensors
    return {name: _by_columns(name, tensor) for name, tensor in tensors.items()}


def _by_columns(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if ".factors." in name:
        return tensor.T.contiguous()
    if tensor.itemsize in (2, 4) and name != "tokens":
        planes = tensor.flatten().view(torch.uint8).reshape(-1, tensor.itemsize).T.contiguous()
        return planes.flatten().view(tensor.dtype).reshape(tensor.shape)
    return tensor


if __name__ == "__main__":
    main()
