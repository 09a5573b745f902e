"""The first token about documents that load slower than they are computed, from a part and without.

python benchmarks/parts.py --out benchmarks/results/parts.json

One engine after the other is asked about the same documents, one by one, over a folder that is read so slowly
that a whole artifact takes `--slower` times as long as a prefill took here before. `computed`: an engine
without prefixes, the baseline. `without parts` and `with parts`: engines as a server has them, which begin
with no idea of this store; with the leading halves on offer or not. `whole`: one that waits for all of every
artifact. Seconds are those to the first token, medians of the last `--counted` documents: the first ones
teach what loading takes. `served`: what served each document, in order; `later_s`: the first token of another
question about the last document, once all of it is there. Whether a half is good enough is not asked here.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import BinaryIO, cast

import torch
from bundled import document_ids, load
from head_start import SlowFile
from loading import publish_factors, stored_calibration
from report import Report, command

from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.choice import best_spec
from xkv_service.compression import compress_each
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates, Way
from xkv_service.engine.messages import Event, Failed, Finished, GenerationRequest, PrefixMatch, Started
from xkv_service.engine.parts import part_offers
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.settings import GenerationSettings

ONE = GenerationSettings(max_new_tokens=1)
PATIENT_S = 600.0


class SlowFolder(LocalBlobStore):
    """A store's folder that is read at so many bytes a second, and nothing ahead."""

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        super().__init__(root)
        self._bytes_per_s = bytes_per_s

    def open(self, artifact_id: str) -> BinaryIO:
        """As a folder does."""
        slow = SlowFile(super().open(artifact_id), self._bytes_per_s, 0.0)
        return cast("BinaryIO", io.BufferedReader(slow))


class Patient(LoadingRates):
    """Every prefix is loaded, and every load is waited for."""

    def decide(self, tokens: int, nbytes: int | None = None, rounds: int = 1) -> Way:
        """Always the load."""
        return "load"

    def deadline_s(self, tokens: int) -> float:
        """As long as it takes."""
        return PATIENT_S


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    loaded = load()
    report = Report("parts", command(), "computing the prompt")
    prompts = [
        document_ids(loaded, arguments.tokens, seed=one).tolist() for one in range(arguments.documents)
    ]
    with tempfile.TemporaryDirectory(dir=arguments.store) as folder, ArtifactStore.open(folder) as store:
        matches = _published(store, loaded, prompts, arguments.ratio)
        sizes = [offer.whole_nbytes for match in matches for offer in match.parts]
        share = sum(offer.nbytes for match in matches for offer in match.parts) / sum(sizes)
        computed = _Asked(loaded, None).about(prompts, [None] * len(prompts))
        base = median(one for one, _ in computed[-arguments.counted :])
        report.add(way="computed", first_token_s=base, ratio=1.0)
        bare = [PrefixMatch(match.artifact_id, match.tokens) for match in matches]
        for slower in arguments.slower:
            folder_of = SlowFolder(Path(folder), median(sizes) / (slower * base))
            slow = ArtifactStore(folder_of, store.catalog)
            for way, offered in (("without parts", bare), ("with parts", matches), ("whole", bare)):
                row = _row(loaded, slow, way, prompts, offered, arguments.counted)
                report.add(slower=slower, way=way, **row, ratio=base / float(row["first_token_s"]))
    report.write(
        arguments.out,
        note="float32, as a CPU computes; a question of 16 tokens behind each document",
        tokens=arguments.tokens,
        documents=arguments.documents,
        whole_bytes=median(sizes),
        part_of_the_bytes=share,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parts.json"))
    parser.add_argument("--store", type=Path, default=Path(), help="where the store is made, and removed")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--counted", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--slower", type=float, nargs="+", default=[1.05, 1.2])
    return parser.parse_args()


def _published(
    store: ArtifactStore, loaded: LoadedModel, prompts: Sequence[list[int]], ratio: float
) -> list[PrefixMatch]:
    """Each document's artifact, with its leading half on offer."""
    calibration = stored_calibration(store)
    spec = best_spec(ratio, calibration)
    matches = []
    for ids in prompts:
        (factors,) = compress_each(loaded.model, ids, [spec], calibration, parts=True)
        name = publish_factors(store, loaded.identity, factors)
        half = part_offers(store.manifest(name), float("inf"), 0.0)[:1]
        matches.append(PrefixMatch(name, len(ids), parts=half))
    return matches


def _row(
    loaded: LoadedModel,
    store: ArtifactStore,
    way: str,
    prompts: Sequence[list[int]],
    matches: Sequence[PrefixMatch],
    counted: int,
) -> dict[str, float | str]:
    """What an engine of its own took for the last documents, and what served each."""
    patient = Patient.measured(loaded.model) if way == "whole" else None
    pool = PrefixPool(loaded.model, store, budget_bytes=1 << 30, rates=patient)
    *found, (later_s, _) = _Asked(loaded, pool).about(prompts, matches)
    pool.close()
    return {
        "first_token_s": median(seconds for seconds, _ in found[-counted:]),
        "later_s": later_s,
        "served": ", ".join(f"{served} {seconds:.2f}" for seconds, served in found),
    }


class _Asked:
    """An engine that is asked about documents, one after the other."""

    def __init__(self, loaded: LoadedModel, pool: PrefixPool | None) -> None:
        self._loaded, self._pool = loaded, pool

    def about(
        self, prompts: Sequence[list[int]], matches: Sequence[PrefixMatch | None]
    ) -> list[tuple[float, str]]:
        """Seconds to the first token, and what served it; last of another question about the last one."""
        with Engine(self._loaded, prefixes=self._pool) as engine:
            found = []
            for ids, match in zip(prompts, matches, strict=True):
                found.append(self._first_token(engine, ids, match, seed=3))
                self._settle()
            if self._pool is not None:
                found.append(self._first_token(engine, prompts[-1], matches[-1], seed=40))
            return found

    def _settle(self) -> None:
        """What is loaded behind an answer is there: the next document has the store to itself."""
        while self._pool is not None and self._pool.state().loading:
            time.sleep(0.05)

    @staticmethod
    def _first_token(
        engine: Engine, ids: list[int], match: PrefixMatch | None, seed: int
    ) -> tuple[float, str]:
        seconds, started = first_token(engine, (*ids, *range(seed, seed + 16)), match)
        if started.artifact_id is None:
            return seconds, "computed" if started.miss is None else started.miss.reason
        return seconds, "whole" if started.part is None else "part"


def first_token(engine: Engine, prompt: tuple[int, ...], match: PrefixMatch | None) -> tuple[float, Started]:
    """Seconds until a prompt's first token is there, and what was told of it."""
    told: list[Event] = []
    ended = threading.Event()

    def hear(event: Event) -> None:
        told.append(event)
        if isinstance(event, Finished | Failed):
            ended.set()

    began = time.perf_counter()
    engine.submit(GenerationRequest("benchmark", prompt, ONE, match=match), hear)
    assert ended.wait(PATIENT_S), "no answer"
    seconds = time.perf_counter() - began
    return seconds, next(event for event in told if isinstance(event, Started))


if __name__ == "__main__":
    main()
