"""Load a stored prefix or prefill it again: seconds of each step on a CPU, and what stays in memory.

python benchmarks/loading.py --out benchmarks/results/loading.json

Baseline: prefilling the same tokens in the same process. Each figure is the median of `--runs`. "dropped"
asks the kernel to forget the file's pages first (posix_fadvise, which needs no rights; whether the disk below
has a cache of its own is not known here); `pages_dropped` says which share of them left.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bundled import document_ids, load
from page_cache import drop, dropped_share
from report import Report, command
from transformers import DynamicCache

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.calibration_format import read_calibration
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, XKVCache, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import load_calibration
from xkv_service.compression import compress
from xkv_service.decoding.loading import load_factors
from xkv_service.decoding.prefix import Prefix
from xkv_service.demo import demo_calibration_path
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import LoadedModel

QUESTION = 32
OTHER = 512
PATIENT_S = 600.0


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    report = Report("loading", command(), "prefilling the same tokens")
    loaded = load()
    question = torch.arange(3, 3 + QUESTION)[None]
    # Not in /tmp, which may be memory: then dropping pages would drop nothing.
    with tempfile.TemporaryDirectory(dir=arguments.store) as folder, ArtifactStore.open(folder) as store:
        calibration = stored_calibration(store)
        with torch.no_grad(), enable_xkv(loaded.model):
            for tokens in map(int, arguments.lengths.split(",")):
                ids = document_ids(loaded, tokens)
                exact = _exact(loaded, ids, question, arguments.prefills)
                for ratio, shared in ((8.0, None), (20.0, calibration)):
                    one = published(store, loaded, ids, ratio, shared)
                    other = published(store, loaded, document_ids(loaded, OTHER, seed=1), ratio, shared)
                    measured = _Measured(store, loaded, one, other, tokens, shared, arguments.runs)
                    report.add(
                        tokens=tokens,
                        ratio=ratio,
                        calibrated=shared is not None,
                        **measured.row(question, exact),
                    )
    report.write(arguments.out, note="float32, as a CPU computes; a question of 32 tokens; MiB; milliseconds")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    parser.add_argument("--store", type=Path, default=Path(), help="where the store is made, and removed")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--prefills", type=int, default=3, help="as --runs, of the baseline")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def stored_calibration(store: ArtifactStore) -> Calibration:
    """The bundled calibration, put into a store."""
    with demo_calibration_path().open("rb") as file:
        manifest, tensors = read_calibration(file)
    return load_calibration(store, store.calibrations.publish(manifest, tensors).id)


def published(
    store: ArtifactStore,
    loaded: LoadedModel,
    ids: torch.Tensor,
    ratio: float,
    calibration: Calibration | None,
) -> str:
    """Compress and publish a prefix; the artifact's id."""
    spec = CompressionSpec(ratio=ratio) if calibration is None else calibrated_spec(ratio, calibration)
    return publish_factors(store, loaded.identity, compress(loaded.model, ids, spec, calibration))


def publish_factors(store: ArtifactStore, identity: ModelIdentity, factors: PrefixFactors) -> str:
    """Publish the factors of a model's prefix; the artifact's id."""
    fields = factors.manifest_fields()
    ids = factors.token_ids.tolist()
    manifest = PrefixManifest(
        id=artifact_id(identity.fingerprint, "benchmark", ids, fields["spec"]),
        model=identity,
        namespace="benchmark",
        document=DocumentRef(uri="benchmark", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    return store.publish(manifest, factors.to_tensors()).id


def _exact(loaded: LoadedModel, ids: torch.Tensor, question: torch.Tensor, runs: int) -> dict[str, float]:
    """Milliseconds of the prefill, and until the first token behind the question."""
    prefill, first = [], []
    for _ in range(runs):
        cache = DynamicCache(config=loaded.model.config)
        prefill.append(_ms(lambda c=cache: loaded.model(ids[None], past_key_values=c, logits_to_keep=1)))
        asked = _ms(lambda c=cache: loaded.model(question, past_key_values=c, logits_to_keep=1))
        first.append(prefill[-1] + asked)
    return {"prefill_ms": median(prefill), "prefill_first_ms": median(first)}


def _ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


class _Measured:
    """One artifact's figures."""

    def __init__(
        self,
        store: ArtifactStore,
        loaded: LoadedModel,
        artifact: str,
        other: str,
        tokens: int,
        calibration: Calibration | None,
        runs: int,
    ) -> None:
        self._store, self._model, self._tokens = store, loaded.model, tokens
        self._artifact, self._other = artifact, other
        self._pool: PrefixPool | None = None
        self._fingerprint, self._calibration, self._runs = loaded.identity.fingerprint, calibration, runs
        self._path = Path(store.blobs.url) / blob_name(artifact)

    def row(self, question: torch.Tensor, exact: dict[str, float]) -> dict[str, Any]:
        """Read and bind apart, then all of it through a pool, as a server does."""
        dropped = dropped_share(self._path)
        read = self._median(self._read)
        cold = self._median(self._read, before=lambda: drop(self._path))
        factors = self._read()
        bind = self._median(lambda: self._bind(factors))
        pool_ms = self._median(lambda: self._through_pool(None), before=self._new_pool)
        resident = self._pool.bytes - self._before
        first = self._median(lambda: self._through_pool(question), before=self._new_pool)
        cold_first = self._median(
            lambda: self._through_pool(question), before=lambda: (self._new_pool(), drop(self._path))
        )
        return {
            "stored_mib": self._path.stat().st_size / 2**20,
            "resident_mib": resident / 2**20,
            "pages_dropped": dropped,
            "read_ms": read,
            "read_dropped_ms": cold,
            "bind_ms": bind,
            "pool_ms": pool_ms,
            "first_token_ms": first,
            "first_token_dropped_ms": cold_first,
            **exact,
            "first_token_ratio": exact["prefill_first_ms"] / first,
            "first_token_dropped_ratio": exact["prefill_first_ms"] / cold_first,
        }

    def _median(self, function: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        times = []
        for _ in range(self._runs):
            before()
            times.append(_ms(function))
        return median(times)

    def _read(self) -> PrefixFactors:
        return load_factors(self._store, self._artifact, calibration_of=lambda *_: self._calibration)

    def _bind(self, factors: PrefixFactors) -> Prefix:
        # A copy, since the prefix of the same factors is remembered.
        return Prefix.of(self._model, replace(factors))

    def _through_pool(self, question: torch.Tensor | None) -> None:
        """One request, and the first token behind `question`, if there is one."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pool.request(self._artifact, self._tokens, answers.put, deadline_s=PATIENT_S)
        prefix = answers.get()
        if question is not None:
            self._model(question, past_key_values=XKVCache(prefix), logits_to_keep=1)

    def _new_pool(self) -> None:
        """A pool that has served another document, so that the calibration is in memory, but not this one."""
        if self._pool is not None:
            self._pool.close()
        self._pool = PrefixPool(
            self._model,
            self._store,
            budget_bytes=1 << 32,
            fingerprint=self._fingerprint,
            rates=LoadingRates(1e-3),
        )
        warm: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pool.request(self._other, OTHER, warm.put, deadline_s=PATIENT_S)
        warm.get()
        self._before = self._pool.bytes


if __name__ == "__main__":
    main()
