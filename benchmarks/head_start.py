"""The first token behind a prefix that has to be loaded: its forward begun during the load, or after it.

python benchmarks/head_start.py --out benchmarks/results/head_start.json

Through a pool, as a server's engine does where nothing else runs. The store is a folder whose pages are in
memory, as it is; slowed down to 100 MB/s; and besides with 20 ms before each read, as an object store may
have, and then as much read ahead as the service does there. The baseline is waiting for the whole load, in
the same process, turn about. Beside the bundled model stands a wider one of random weights, whose prefix is
one of 256 tokens with its token factors and index repeated: times are those of its shapes, answers mean
nothing. `load_ms` is the load alone, `ratio` the baseline's time over that of the head start.
"""

from __future__ import annotations

import argparse
import io
import queue
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, cast

import torch
from bundled import document_ids, load
from loading import OTHER, PATIENT_S, publish_factors, published, stored_calibration
from report import Report, command
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.object_blobs import AHEAD_BYTES
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.engine.head_start import HeadStarts
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.factors import LowRank, PrefixFactors

SHORT = 256
STORES = {"folder": (0.0, 0.0), "100 MB/s": (100.0, 0.0), "100 MB/s, 20 ms a read": (100.0, 20.0)}
"""MB/s (0: as fast as it is) and milliseconds before each read."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    report = Report("head_start", command(), "waiting for the whole load")
    with tempfile.TemporaryDirectory(dir=arguments.store) as folder, ArtifactStore.open(folder) as store:
        for name, model, artifact, warm in _cases(store, arguments.tokens, wide=arguments.wide):
            with torch.no_grad(), enable_xkv(model):
                for place, (rate, wait_ms) in STORES.items():
                    slow = ArtifactStore(SlowFolder(Path(folder), rate, wait_ms), store.catalog)
                    for question in arguments.questions:
                        ids = torch.arange(3, 3 + question).tolist()
                        row = _Measured(model, slow, artifact, arguments.tokens, warm).row(
                            ids, arguments.runs
                        )
                        size = store.blobs.size(artifact) / 2**20
                        report.add(model=name, store=place, question=question, stored_mib=size, **row)
    note = "float32, as a CPU computes; medians"
    report.write(arguments.out, note=note, tokens=arguments.tokens, runs=arguments.runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/head_start.json"))
    parser.add_argument("--store", type=Path, default=Path(), help="where the store is made, and removed")
    parser.add_argument("--tokens", type=int, default=8192, help=f"of the prefix, a multiple of {SHORT}")
    parser.add_argument("--questions", type=int, nargs="+", default=[8, 32], help="tokens")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wide", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


class SlowFile(io.RawIOBase):
    """A file that is read at so many bytes a second, each read after a wait."""

    def __init__(self, file: BinaryIO, bytes_per_s: float, wait_s: float) -> None:
        self._file, self._bytes_per_s, self._wait_s = file, bytes_per_s, wait_s

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As the file."""
        return self._file.seek(offset, whence)

    def readinto(self, view: Any) -> int:
        """Fill the view, and take the time that it takes."""
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        time.sleep(self._wait_s + count / self._bytes_per_s)
        return count

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()


class SlowFolder(LocalBlobStore):
    """A store's folder that is read so slowly."""

    def __init__(self, root: Path, mb_per_s: float, wait_ms: float) -> None:
        super().__init__(root)
        self._mb_per_s, self._wait_ms = mb_per_s, wait_ms

    def open(self, artifact_id: str) -> BinaryIO:
        """As a folder does."""
        file = super().open(artifact_id)
        if not self._mb_per_s:
            return file
        slow = SlowFile(file, 1e6 * self._mb_per_s, self._wait_ms / 1e3)
        return cast("BinaryIO", io.BufferedReader(slow, AHEAD_BYTES))


def _cases(
    store: ArtifactStore, tokens: int, *, wide: bool
) -> Iterator[tuple[str, PreTrainedModel, str, str | None]]:
    """Name, model, artifact, and one of the same calibration that is resident already."""
    loaded = load()
    ids = document_ids(loaded, tokens)
    yield "bundled, 8x", loaded.model, published(store, loaded, ids, 8.0, None), None
    shared = stored_calibration(store)
    other = published(store, loaded, document_ids(loaded, OTHER, seed=1), 20.0, shared)
    yield "bundled, 20x", loaded.model, published(store, loaded, ids, 20.0, shared), other
    if wide:
        model = _wide_model()
        identity = ModelIdentity(fingerprint="a" * 64, name="wide", architecture="Llama", dtype="float32")
        yield "wide, 8x", model, publish_factors(store, identity, _repeated(model, tokens // SHORT)), None


def _wide_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=16384,
    )
    return LlamaForCausalLM(config).eval()


def _repeated(model: PreTrainedModel, times: int) -> PrefixFactors:
    """A prefix `times` as long as one of random tokens, of the bytes that 8x leaves of 8,192 tokens."""
    short = compress(model, torch.randint(3, 999, (SHORT,)), CompressionSpec(rank_k=160, rank_v=240))

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat(times, *[1] * (tensor.ndim - 1))

    def pair(half: LowRank) -> LowRank:
        assert isinstance(half.factors, torch.Tensor)
        return replace(half, factors=longer(half.factors))

    return replace(
        short,
        token_ids=longer(short.token_ids),
        groups=tuple(
            replace(one, keys=pair(one.keys), values=one.values and pair(one.values)) for one in short.groups
        ),
        sketches={
            layer: replace(one, codes=longer(one.codes), scales=longer(one.scales))
            for layer, one in short.sketches.items()
        },
    )


class _Measured:
    """First tokens behind one artifact, each through a pool that does not hold it."""

    def __init__(
        self, model: PreTrainedModel, store: ArtifactStore, artifact: str, tokens: int, warm: str | None
    ) -> None:
        self._model, self._store, self._artifact = model, store, artifact
        self._tokens, self._warm = tokens, warm
        self._starts = HeadStarts(model, SelectionSpec())

    def row(self, ids: list[int], runs: int) -> dict[str, float]:
        """Medians in milliseconds of both ways, and of the load alone."""
        found: list[tuple[float, float, float]] = []
        for _ in range(runs):
            load_ms, after = self._after(ids)
            found.append((load_ms, after, self._beside(ids)))
        load_ms, after, beside = (median(column) for column in zip(*found, strict=True))
        return {
            "load_ms": load_ms,
            "forward_ms": after - load_ms,
            "first_token_ms": after,
            "head_start_ms": beside,
            "ratio": after / beside,
        }

    def _after(self, ids: list[int]) -> tuple[float, float]:
        with self._pool() as pool:
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            began = time.perf_counter()
            pool.request(self._artifact, self._tokens, answers.put, deadline_s=PATIENT_S)
            prefix = answers.get()
            load_ms = 1000 * (time.perf_counter() - began)
            self._model(torch.tensor([ids]), past_key_values=XKVCache(prefix), logits_to_keep=1)
            return load_ms, 1000 * (time.perf_counter() - began)

    def _beside(self, ids: list[int]) -> float:
        with self._pool() as pool:
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            start = self._starts.of(ids, lambda prefix, ran: answers.put(ran))
            began = time.perf_counter()
            pool.request(
                self._artifact, self._tokens, start.loaded, deadline_s=PATIENT_S, on_arriving=start.begin
            )
            assert answers.get() is not None
            return 1000 * (time.perf_counter() - began)

    def _pool(self) -> PoolOnce:
        return PoolOnce(self._model, self._store, self._warm)


class PoolOnce:
    """A pool for one load, its calibration in memory."""

    def __init__(self, model: PreTrainedModel, store: ArtifactStore, warm: str | None) -> None:
        self._pool = PrefixPool(model, store, budget_bytes=1 << 32, rates=LoadingRates(1e-3))
        if warm is not None:
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._pool.request(warm, OTHER, answers.put, deadline_s=PATIENT_S)
            answers.get()

    def __enter__(self) -> PrefixPool:
        return self._pool

    def __exit__(self, *_: object) -> None:
        self._pool.close()


if __name__ == "__main__":
    main()
