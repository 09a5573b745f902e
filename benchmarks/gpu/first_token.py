"""Time to the first token of a Llama-3.1-8B-shaped model: an artifact loaded, a raw cache loaded, or prefill.

python benchmarks/gpu/first_token.py --out benchmarks/results/gpu/first_token.json
python benchmarks/gpu/first_token.py --tiny --out first_token.json      # small, on a CPU: checks this script

Random weights in bfloat16. For each length: the model's own prefill of the document and a question of 32
tokens, one forward; the document precomputed by a worker's own `compute` (prefill, compression, fidelity,
blob on disk), by stage; the artifact loaded, bound and asked, one after the other ("load") and with the
question's forward beside the load ("head start"); and the raw cache, loaded in two plain ways, unchecked.
Files in the page cache, and from the disk: their pages are dropped first, `disk_share` says how much of
them this process had read from a disk. The device is waited for at each end. Loads: figures of the run whose
first token came in the median time, so that they add up: header, waiting for parts, binding, the match of the
first tokens (all on the loading thread, the device not waited for), the question, and the rest. The question
runs as the engine runs it: by a graph from the second of its size on. `cold_s`: the run before, which finds
no memory of the device kept, and no graph.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import hashlib
import os
import pstats
import queue
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import page_cache
from compression import LLAMA_8B, TINY, Stages, _replaced
from plain_store import PlainStore
from raw_cache import RawCache
from report import Report, command

from xkv_artifacts import format as blob_format
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compression, enable_xkv
from xkv_service.artifact_parts import part_names
from xkv_service.decoding import kernel_choice, prefix
from xkv_service.decoding.arriving import Arriving
from xkv_service.decoding.device_landing import HOST, MOST_THREADS, PINNED, landing_for, place_of
from xkv_service.decoding.loading import load_parts
from xkv_service.decoding.matching import FirstKeys, FirstTokens
from xkv_service.decoding.placing import Copies
from xkv_service.decoding.prefix import Binding, Prefix
from xkv_service.engine import prefix_loading
from xkv_service.engine.head_start import HeadStarts
from xkv_service.engine.prefix_loading import PrefixLoading
from xkv_service.engine.runners import Runner, make_runner
from xkv_service.errors import InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.prefilling import prefill as prefilling
from xkv_service.sessions.context import Context
from xkv_workers.messages import Failed, ModelPlace, PrefixJob, WorkerConfig
from xkv_workers.worker import PrefixWorker

QUESTION = 32
_TAIL = 512
"""Tokens in a session's tail, where sessions that fit are counted."""
_RESERVED = 6 * 2**30
"""Bytes left for activations there, as in decode_step.py."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    run = _Run(arguments)
    report = Report("first_token", command(), "prefill of document and question in one forward")
    report.keep(
        arguments.out,
        model="Llama-3.1-8B shapes, random weights",
        question=QUESTION,
        kernels="on" if kernel_choice.kernels_run(run.device) else "off",
    )
    # Not in /tmp, which may be memory: then dropping pages would drop nothing.
    with (
        tempfile.TemporaryDirectory(dir=arguments.store) as folder,
        torch.no_grad(),
        enable_xkv(run.model),
    ):
        run.folder, run.runner = Path(folder), make_runner(run.model)
        run.warm_up()
        for tokens in run.lengths:
            for row in run.rows(tokens):
                report.add(**row)
    report.write(arguments.out, seconds=run.elapsed())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu/first_token.json"))
    parser.add_argument("--store", type=Path, default=Path(), help="where files are made, and removed")
    parser.add_argument("--lengths", default="64,8,128", help="thousands of tokens, comma-separated")
    parser.add_argument("--ratios", default="8,20", help="times smaller than the whole cache")
    parser.add_argument("--runs", type=int, default=5, help="of each figure, the median is kept")
    parser.add_argument(
        "--patience", type=float, default=8, help="seconds after which a figure has no more runs"
    )
    parser.add_argument("--seconds", type=float, default=440, help="after so many nothing is begun")
    parser.add_argument("--no-raw", action="store_true", help="leave out raw caches")
    parser.add_argument(
        "--many", type=int, default=0, metavar="N", help="documents an hour of N, two at a time, too"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where a load's own thread spends its time"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: checks this script")
    return parser.parse_args()


class _Run:
    """All that is measured."""

    folder: Path
    runner: Runner

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._started, self._arguments = time.perf_counter(), arguments
        tiny = arguments.tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.model = _model(TINY if tiny else LLAMA_8B, self.device)
        inspect_loaded(self.model)
        self.lengths = [1024] if tiny else [1024 * int(one) for one in arguments.lengths.split(",")]
        self.ratios = [2.0] if tiny else [float(one) for one in arguments.ratios.split(",")]
        self.question = torch.arange(3, 3 + QUESTION, device=self.device)[None]
        self.identity = ModelIdentity(
            fingerprint=hashlib.sha256(b"random").hexdigest(),
            name="random",
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
        )

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.elapsed() > self._arguments.seconds

    def ids(self, tokens: int, seed: int = 0) -> torch.Tensor:
        """int64 [tokens], a document."""
        generator = torch.Generator().manual_seed(tokens + seed)
        return torch.randint(3, self.model.config.vocab_size, (tokens,), generator=generator)

    def warm_up(self) -> None:
        """One of everything, small."""
        tokens = 512 if self._arguments.tiny else 4096
        artifact = _Artifact(self, tokens, 2.0)
        artifact.precompute()
        for way in (artifact.load, artifact.head_start):
            way()
        self.prefill(self.ids(tokens))

    def rows(self, tokens: int) -> Iterator[dict[str, Any]]:
        """The baseline, a raw cache, and artifacts, one row each."""
        if self.over():
            return
        ids = self.ids(tokens)
        self.reset_peak()
        base, runs = self.median(lambda: self.prefill(ids), most=2)
        yield {
            "tokens": tokens,
            "way": "prefill",
            "first_token_s": base,
            "runs": runs,
            "peak_gib": self.peak(),
        }
        for ratio in self.ratios:
            if not self.over():
                yield from self._artifact_rows(tokens, ratio, base)
        if not self._arguments.no_raw and not self.over():
            yield from self._raw_rows(ids, base)

    def _artifact_rows(self, tokens: int, ratio: float, base: float) -> Iterator[dict[str, Any]]:
        artifact = _Artifact(self, tokens, ratio)
        self.reset_peak()
        try:
            stages = artifact.precompute()
        except InvalidSpec as error:
            print(f"{tokens} tokens at {ratio:g}x: {error.message}", flush=True)
            return
        yield {"tokens": tokens, "way": f"precompute, {ratio:g}x", **stages, "peak_gib": self.peak()}
        name = f"artifact, {ratio:g}x"
        yield {"tokens": tokens, "way": f"{name}, stages alone", **artifact.stages()}
        if self._arguments.profile:
            artifact.profile()
        for way, function in (("load", artifact.load), ("head start", artifact.head_start)):
            for source in ("page cache", "disk"):
                if self.over():
                    return
                row = self.loads(artifact.path, source, function)
                ratio_to_base = {"times_prefill": base / row["first_token_s"]}
                memory = artifact.memory() if (way, source) == ("load", "page cache") else {}
                yield {"tokens": tokens, "way": f"{name}, {way}, {source}", **row, **ratio_to_base, **memory}
        if self._arguments.many and ratio == self.ratios[0] and not self.over():
            many = artifact.precompute_many(self._arguments.many)
            yield {"tokens": tokens, "way": f"precompute, {ratio:g}x, many", **many}
        artifact.path.unlink()

    def _raw_rows(self, ids: torch.Tensor, base: float) -> Iterator[dict[str, Any]]:
        cache = DynamicCache(config=self.model.config)
        self.model(ids[None].to(self.device), past_key_values=cache, logits_to_keep=1)
        raw = RawCache(self.folder / "raw.safetensors", self.model, cache)
        del cache
        ways = (("threads", lambda: raw.by_threads(_threads())), ("load_file", raw.by_safetensors))
        for source in ("page cache", "disk"):
            for name, load in ways if source == "page cache" else ways[:1]:
                if self.over():
                    break
                row = self.loads(raw.path, source, lambda load=load: self._ask_raw(load))
                ratio = base / row["first_token_s"]
                way = f"raw cache, {name}, {source}"
                yield {"tokens": ids.numel(), "way": way, **row, "times_prefill": ratio}
        raw.path.unlink()

    def _ask_raw(self, load: Callable[[], DynamicCache]) -> dict[str, float]:
        def ask(cache: DynamicCache) -> int:
            logits = self.model(self.question, past_key_values=cache, logits_to_keep=1).logits
            return int(logits[0, -1].argmax())

        clock = _Clock()
        took = self.timed(lambda: clock.timed("question", ask)(self._waited(clock, load)))[1]
        return {"first_token_s": took, **clock.figures(took)}

    def _waited(self, clock: _Clock, load: Callable[[], DynamicCache]) -> DynamicCache:
        return clock.timed("load", lambda: self.timed(load)[0])()

    def loads(self, path: Path, source: str, function: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Of a function that loads a file and says what took how long, the run of the median time."""
        disk = source == "disk"
        share = {"pages_dropped": page_cache.dropped_share(path)} if disk else {}
        self.reset_peak()
        cold = {} if disk else {"cold_s": function()["first_token_s"]}
        found, read, begun = [], [], time.perf_counter()
        while len(found) < self._arguments.runs and (
            not found or time.perf_counter() - begun < self._arguments.patience
        ):
            if disk:
                page_cache.drop(path)
            before = page_cache.bytes_read()
            found.append(function())
            read.append((page_cache.bytes_read() - before) / path.stat().st_size)
        found.sort(key=lambda one: one["first_token_s"])
        middle, spread = found[(len(found) - 1) // 2], {"least_s": found[0]["first_token_s"]}
        file = {"file_gib": path.stat().st_size / 2**30, "disk_share": median(read)}
        return {**middle, **spread, **cold, "runs": len(found), **file, **share, "peak_gib": self.peak()}

    def prefill(self, ids: torch.Tensor) -> int:
        """The model's own first token behind document and question."""
        cache = DynamicCache(config=self.model.config)
        tokens = torch.cat([ids.to(self.device)[None], self.question], 1)
        logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def median(self, function: Callable[[], Any], most: int) -> tuple[float, int]:
        """Median seconds, and of how many runs."""
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < most and (not times or time.perf_counter() - begun < 3 * self._arguments.patience):
            times.append(self.timed(function)[1])
        return median(times), len(times)

    def timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What a function returns, and seconds."""
        self.wait()
        started = time.perf_counter()
        result = function()
        self.wait()
        return result, time.perf_counter() - started

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB allocated on the device at most, the model's weights included."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


class _Artifact:
    """One document, compressed at one ratio."""

    def __init__(self, run: _Run, tokens: int, ratio: float) -> None:
        self._run, self._model = run, run.model
        self.tokens, self.spec = tokens, CompressionSpec(ratio=ratio)
        self.store = PlainStore(run.folder)
        self._loading = PrefixLoading(run.model, cast(Any, self.store), SelectionSpec(), None)
        self._job = self._job_of(0)

    @property
    def path(self) -> Path:
        """The blob's file."""
        return self.store.path(self._job.artifact_id)

    def _job_of(self, seed: int) -> PrefixJob:
        ids = self._run.ids(self.tokens, seed).tolist()
        name = artifact_id(self._run.identity.fingerprint, "benchmark", ids, self.spec.canonical())
        return PrefixJob(name, array("i", ids), DocumentRef(uri="benchmark", sha256="0" * 64))

    def _worker(self) -> PrefixWorker:
        run = self._run
        place = ModelPlace("", None, "bfloat16", run.identity.fingerprint, run.device.type, 1, "", "")
        loaded = LoadedModel(run.model, cast(Any, None), run.identity)
        config = WorkerConfig(place, "benchmark", self.spec)
        return PrefixWorker(config, loaded, cast(Any, self.store))

    def precompute(self) -> dict[str, float]:
        """Seconds of one document, whole and by stage; it stays in the store."""
        stages = Stages(self._run.device)
        with _replaced(
            (prefilling, "prefill_batch", lambda f: stages.timed("prefill", f)),
            (compression, "compress_prefill", lambda f: stages.timed("compress", f)),
            (compression, "certify", lambda f: stages.timed("fidelity", f)),
            (PrefixFactors, "to_tensors", lambda f: stages.timed("to_host", f)),
            (blob_format, "lay_out", lambda f: stages.timed("checksums", f)),
            (self.store, "publish", lambda f: stages.timed("save", f)),
        ):
            took = self._run.timed(lambda: self._compute(self._worker(), self._job))[1]
        seconds = stages.seconds
        seconds["compress"] -= seconds["fidelity"]
        seconds["save"] -= seconds["checksums"]
        named = {f"{name}_s": value for name, value in seconds.items()}
        return {"document_s": took, "documents_per_hour": 3600 / took, **named}

    def precompute_many(self, count: int) -> dict[str, float]:
        """Documents an hour as a worker computes them: one is written while the next one prefills."""
        worker, jobs = self._worker(), [self._job_of(seed) for seed in range(1, count + 1)]
        waiting: queue.SimpleQueue[PrefixJob] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)

        def work() -> None:
            while not waiting.empty():
                self._compute(worker, waiting.get())

        def both() -> None:
            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        took = self._run.timed(both)[1]
        for job in jobs:
            self.store.path(job.artifact_id).unlink()
        return {"document_s": took / count, "documents_per_hour": 3600 * count / took}

    def _compute(self, worker: PrefixWorker, job: PrefixJob) -> None:
        with torch.enable_grad():  # as a worker is called
            (outcome,) = worker.compute([job])
        if isinstance(outcome, Failed):
            raise InvalidSpec(outcome.reason, hint="")

    def load(self) -> dict[str, float]:
        """Load, bind, ask: one after the other."""
        name, clock, ends = self._job.artifact_id, _Clock(), []

        def first_token() -> int:
            bound = self._bind(clock, name)
            self._run.wait()
            ends.append(time.perf_counter())
            return clock.timed("question", self._ask)(bound)

        begun = time.perf_counter()
        took = self._run.timed(first_token)[1]
        return {"first_token_s": took, "load_s": ends[0] - begun, **clock.figures(took)}

    def _bind(self, clock: _Clock, name: str, **options: Any) -> Prefix:
        blob_format._kept.cache_clear()  # every load parses its header, once, as the first one does
        with clock.steps():
            announced = clock.timed("header", self._loading.announce)(name)
            return self._loading.bind(announced, None, **options)

    def profile(self) -> None:
        """Print what takes the time of the thread that binds and asks; of the second load."""
        self.load()
        with cProfile.Profile() as profile:
            self.load()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)

    def head_start(self) -> dict[str, float]:
        """The question's forward beside the load, as a server begins it."""
        starts, ended = HeadStarts(self._model, SelectionSpec()), queue.SimpleQueue[Any]()
        clock = _Clock()

        def first_token() -> int:
            name = self._job.artifact_id
            start = starts.of(self._run.question[0].tolist(), lambda answer, ran: ended.put(ran))
            start.loaded(self._bind(clock, name, on_arriving=start.begin))
            ran = clock.timed("after", ended.get)(timeout=60)
            if ran is None:
                raise RuntimeError("the forward beside a load failed")
            return int(ran.logits.argmax())

        took = self._run.timed(first_token)[1]
        return {"first_token_s": took, **clock.figures(took)}

    def _ask(self, bound: Prefix) -> int:
        """As the engine does."""
        cache = XKVCache(bound, SelectionSpec())
        context = Context(self._model, cache, bound.token_ids.tolist())
        question = self._run.question[0].tolist()
        token = int(self._run.runner.run([(context, question)])[0].argmax())
        self._run.runner.settle(context)
        return token

    def memory(self) -> dict[str, float]:
        """GiB of a loaded prefix and of a session's tail; sessions that fit, each with its own document."""
        if self._run.device.type != "cuda":
            return {}
        self._run.reset_peak()
        before = torch.cuda.memory_allocated()
        bound = self._loading.bind(self._loading.announce(self._job.artifact_id), None)
        resident = torch.cuda.memory_allocated() - before
        config, total = self._model.config, torch.cuda.get_device_properties(0).total_memory
        token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        room = total - before - _RESERVED
        del bound
        return {
            "resident_gib": resident / 2**30,
            "full_gib": self.tokens * token / 2**30,
            "tail_gib": _TAIL * token / 2**30,
            "sessions": room // (resident + _TAIL * token),
            "sessions_full": room // ((self.tokens + _TAIL) * token),
        }

    def stages(self) -> dict[str, float]:
        """Seconds of each stage of a load, one after the other, from the page cache; the second run's."""
        self._stages()
        return self._stages()

    def _stages(self) -> dict[str, float]:
        run, store, name = self._run, self.store, self._job.artifact_id
        blob_format._kept.cache_clear()
        manifest, header_s = run.timed(lambda: store.manifest(name))
        landing = _Host(run.device)
        landing.begin()
        with _replaced((blob_format, "fill_extent", lambda f: _unchecked)):
            _, read_s = run.timed(lambda: list(store.load_parts(name, part_names(manifest), landing)))
        landing.begin()
        _, check_s = run.timed(lambda: list(store.load_parts(name, part_names(manifest), landing)))
        bulk = landing.bulk()
        copy_s = run.timed(lambda bulk=bulk: _copied(bulk, run.device))[1]
        del bulk
        head, *groups = load_parts(cast(Any, store), manifest, None, landing_for(run.device))
        bind_s = run.timed(lambda: self._bound(manifest, head, groups))[1]
        stages = Stages(run.device)
        with _replaced((prefix, "_derive_indexes", lambda f: stages.timed("derive", f))):
            self._bound(manifest, head, groups)
        match_s = run.timed(lambda: self._matched(head, groups))[1]
        return {
            "header_s": header_s,
            "read_s": read_s,
            "read_and_check_s": check_s,
            "copy_s": copy_s,
            "bind_s": bind_s,
            "derive_s": stages.seconds["derive"],
            "match_s": match_s,
        }

    def _bound(self, manifest: Any, head: PrefixFactors, groups: list[PrefixFactors]) -> None:
        binding = Binding(self._model, head, manifest.groups)
        for group in groups:
            binding.add(group)

    def _matched(self, head: PrefixFactors, groups: list[PrefixFactors]) -> None:
        first = FirstTokens(FirstKeys(self._model), head)
        for group in groups:
            first.add(group)
        first.check()


class _Clock:
    """Seconds of the steps of a load on the thread that takes them; the device is not waited for.

    `after` is what a forward beside the load takes longer than the load.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def figures(self, whole: float) -> dict[str, float]:
        """The steps, and what of `whole` is in none of them."""
        rest = whole - sum(self._seconds.values())
        return {**{f"{name}_s": value for name, value in self._seconds.items()}, "rest_s": rest}

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Time the steps of `PrefixLoading.bind`."""
        bind, match = (partial(self.timed, name) for name in ("bind", "match"))
        with _replaced(
            (prefix_loading, "load_parts", self._waiting),
            *((Binding, name, bind) for name in ("__init__", "add")),
            *((FirstTokens, name, match) for name in ("__init__", "add", "check")),
            (Arriving, "settle", partial(self.timed, "settle")),
        ):
            yield

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to a step."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

        return measured

    def _waiting(self, load: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def parts(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with closing(load(*args, **kwargs)) as found:
                take = self.timed("wait", lambda: next(found, None))
                while (part := take()) is not None:
                    yield part

        return parts


class _Host:
    """A landing in (pinned) memory."""

    together = False

    def __init__(self, device: torch.device) -> None:
        self.threads, self._pinned = _threads(), device.type == "cuda"

        self.begin()

    def begin(self) -> None:
        """Forget what was read."""
        self._read: list[tuple[str, torch.Tensor]] = []

    def bulk(self) -> list[torch.Tensor]:
        """What is copied to the device while other extents are read."""
        return [one for place, one in self._read if place not in (HOST, PINNED)]

    def place(self, name: str) -> str:
        return place_of(name)

    def buffer(self, place: str, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def placed(self, place: str, buffer: torch.Tensor) -> torch.Tensor:
        self._read.append((place, buffer))
        return buffer


def _unchecked(file: Any, extent: Any, digests: Any, view: memoryview) -> None:
    file.fill(view, extent.start, "")


def _copied(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    if device.type != "cuda":
        return tensors
    copies = Copies(device)
    copied = [copies.copy(one) for one in tensors]
    copies.join()
    return copied


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _model(fields: dict[str, Any], device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**fields, "max_position_embeddings": 262144}, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


if __name__ == "__main__":
    main()
