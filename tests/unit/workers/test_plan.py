"""From files to jobs and forecasts, without a model: documents are rendered as their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from xkv_service.errors import InvalidPrompt, RatioUnreachable
from xkv_service.spec import CompressionSpec
from xkv_workers.corpus import Rejected, list_files
from xkv_workers.estimate import START_SECONDS, Rate, forecast
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import PrefixJob, Stored
from xkv_workers.plan import Target, plan

SHORTEST = 10


def render(text: str) -> list[int]:
    if "unstable" in text:
        raise InvalidPrompt("no stable prefix", hint="use raw")
    return list(text.encode())


def check_size(tokens: int) -> None:
    if tokens < SHORTEST:
        raise RatioUnreachable("ratio=8 cannot be reached", hint="lower it")


@pytest.fixture
def target() -> Target:
    return Target(
        fingerprint="f" * 64,
        namespace="default",
        spec=CompressionSpec().canonical(),
        render=render,
        check_size=check_size,
        window=100,
    )


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def planned(folder: Path, target: Target) -> dict[str, PrefixJob | Rejected]:
    items = plan(list_files([folder]), target)
    return {
        (item.uri if isinstance(item, Rejected) else item.document.uri).split("/")[1]: item for item in items
    }


def test_each_document_is_a_job_or_a_reason(tmp_path: Path, target: Target) -> None:
    write(tmp_path, good="a good document", long="x" * 100, short="short", odd="unstable text here", empty="")
    items = planned(tmp_path, target)
    reasons = {name: item.reason for name, item in items.items() if isinstance(item, Rejected)}
    assert reasons == {
        "long.txt": "too long: 100 tokens, and the model's window of 100 has to hold a chat as well",
        "short.txt": "ratio=8 cannot be reached (lower it)",
        "odd.txt": "no stable prefix (use raw)",
        "empty.txt": "empty: 0 characters",
    }
    good = items["good.txt"]
    assert isinstance(good, PrefixJob)
    assert list(good.token_ids) == list(b"a good document")


def test_ids_depend_on_what_shapes_the_artifact_and_on_nothing_else(tmp_path: Path, target: Target) -> None:
    write(tmp_path, a="the same text", b="the same text", c="another text")
    first = {name: item.artifact_id for name, item in planned(tmp_path, target).items()}  # type: ignore[union-attr]
    assert first["a.txt"] == first["b.txt"] != first["c.txt"]
    for other in (
        replace(target, fingerprint="e" * 64),
        replace(target, namespace="team"),
        replace(target, spec=CompressionSpec(ratio=4).canonical()),
    ):
        again = {name: item.artifact_id for name, item in planned(tmp_path, other).items()}  # type: ignore[union-attr]
        assert not set(first.values()) & set(again.values())


def test_a_model_that_names_no_window_takes_any_length(tmp_path: Path, target: Target) -> None:
    write(tmp_path, long="x" * 100_000)
    assert isinstance(planned(tmp_path, replace(target, window=None))["long.txt"], PrefixJob)


@dataclass(frozen=True)
class TenToOne:
    bytes_full: int

    @property
    def bytes_stored(self) -> int:
        return self.bytes_full // 10


def test_a_forecast_counts_what_would_be_computed(tmp_path: Path, target: Target) -> None:
    write(tmp_path, a="x" * 20, b="x" * 20, c="y" * 30, d="z" * 40, bad="")
    jobs = planned(tmp_path, target)
    here = jobs["d.txt"]
    assert isinstance(here, PrefixJob)
    stored = Stored(here.artifact_id, 40, 4000, 500, 1.0, 0.0)
    result = forecast(
        plan(list_files([tmp_path]), target),
        lambda job: stored if job == here else None,
        lambda tokens: TenToOne(100 * tokens),
        Rate.of(10.0, "cpu"),
        Standard(),
    )
    assert (result.documents, result.compute, result.reuse, result.failed) == (5, 2, 2, 1)
    assert (result.tokens, result.bytes_full, result.bytes_stored) == (50, 5000, 500)
    assert result.seconds == 5.0 + START_SECONDS
    assert "measured" in result.seconds_basis and "guess" in Rate.of(None, "cuda").basis
    actions = {line.document.split("/")[1]: line.action for line in result.plan}
    assert actions == {"a.txt": "compute", "b.txt": "same as another", "c.txt": "compute", "d.txt": "reuse"}


def test_a_forecast_reuses_nothing_below_the_fidelity_asked_for(tmp_path: Path, target: Target) -> None:
    write(tmp_path, a="x" * 20, copy="x" * 20, b="y" * 30)
    low, high = (planned(tmp_path, target)[name] for name in ("a.txt", "b.txt"))
    assert isinstance(low, PrefixJob) and isinstance(high, PrefixJob)
    stored = {
        low.artifact_id: Stored(low.artifact_id, 20, 2000, 250, 0.93, 0.1),
        high.artifact_id: Stored(high.artifact_id, 30, 3000, 350, 0.99, 0.0),
    }
    result = forecast(
        plan(list_files([tmp_path]), target),
        lambda job: stored.get(job.artifact_id),
        lambda tokens: TenToOne(100 * tokens),
        Rate.of(10.0, "cpu"),
        Standard(min_fidelity=0.99),
    )
    assert (result.documents, result.compute, result.reuse, result.failed) == (3, 0, 1, 2)
    assert {error.reason for error in result.errors} == {
        "stored already with fidelity 0.930, below 0.99: "
        "lower --min-fidelity, or compress with a lower --ratio"
    }
