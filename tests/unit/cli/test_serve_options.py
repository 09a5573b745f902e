"""What `xkv serve` makes of its options: the request that the server is started with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result

from xkv_cli.serve import serve
from xkv_service.errors import XKVError
from xkv_workers.serving import server
from xkv_workers.serving.server import ServeRequest

pytestmark = pytest.mark.usefixtures("own_signals")


class _Asked(XKVError):
    """Instead of a server."""


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> tuple[Result, list[Any]]:
    requests: list[Any] = []

    @contextmanager
    def serving(request: ServeRequest) -> Iterator[None]:
        requests.append(request)
        raise _Asked("no server is started here")
        yield

    monkeypatch.setattr(server, "serving", serving)
    return CliRunner().invoke(serve, arguments, env=environment), requests


@pytest.mark.parametrize(
    ("arguments", "environment", "seconds"),
    [
        ([], {}, 1.0),
        (["--lookup-timeout", "7s"], {}, 7.0),
        ([], {"XKV_LOOKUP_TIMEOUT": "60s"}, 60.0),
        (["--lookup-timeout", "7s"], {"XKV_LOOKUP_TIMEOUT": "60s"}, 7.0),
    ],
)
def test_how_long_a_prompt_waits_for_the_catalog(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], seconds: float
) -> None:
    monkeypatch.delenv("XKV_LOOKUP_TIMEOUT", raising=False)
    result, (request,) = _run(monkeypatch, *arguments, **environment)
    assert isinstance(result.exception, _Asked)
    assert request.api.lookup_timeout_s == seconds


@pytest.mark.parametrize(
    ("arguments", "environment", "model"),
    [
        ([], {}, None),
        ([], {"XKV_MODEL": ""}, None),  # as docker-compose.yml gives one that is not set
        ([], {"XKV_MODEL": "my-llama"}, "my-llama"),
        (["--model", "other"], {"XKV_MODEL": "my-llama"}, "other"),
    ],
)
def test_the_model_may_be_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], model: str | None
) -> None:
    monkeypatch.delenv("XKV_MODEL", raising=False)
    _, (request,) = _run(monkeypatch, *arguments, **environment)
    assert request.model == model


@pytest.mark.parametrize(
    ("arguments", "environment", "is_open"),
    [
        ([], {}, False),
        ([], {"XKV_OPEN_NETWORK": ""}, False),  # as docker-compose.yml gives one that is not set
        ([], {"XKV_OPEN_NETWORK": "0"}, False),
        ([], {"XKV_OPEN_NETWORK": "1"}, True),
        (["--open-network"], {}, True),
    ],
)
def test_the_network_may_be_opened_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], is_open: bool
) -> None:
    monkeypatch.delenv("XKV_OPEN_NETWORK", raising=False)
    _, (request,) = _run(monkeypatch, *arguments, **environment)
    assert request.api.open_network == is_open and request.api.published is None


def test_no_time_at_all_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = _run(monkeypatch, "--lookup-timeout", "0s")
    assert result.exit_code == 2 and not requests
    assert "--lookup-timeout=0 is out of range: use more than 0" in result.output


@pytest.mark.parametrize("option", ["--target-requests=4", "--upscale-delay=30s", "--downscale-delay=1m"])
def test_what_says_when_replicas_come_and_go_is_wrong_where_none_do(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    name = option.partition("=")[0]
    for replicas, fixed in (((), "1"), (("--replicas", "2"), "2"), (("--replicas", "3-3"), "3")):
        result, requests = _run(monkeypatch, option, *replicas)
        assert result.exit_code == 2 and not requests
        said = f"{name} is for replicas whose number changes, and --replicas is {fixed}: give --replicas N-M"
        assert said in result.output
    result, requests = _run(monkeypatch, option, "--replicas", "1-2")
    assert isinstance(result.exception, _Asked) and requests


def test_how_long_stored_tails_stay_is_wrong_where_none_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    result, requests = _run(monkeypatch, "--stored-tail-ttl", "1h", "--stored-tails", "0")
    assert result.exit_code == 2 and not requests
    assert "--stored-tail-ttl is for what --stored-tails has room for, and that is 0" in result.output
    for options in (["--stored-tails", "0"], ["--stored-tail-ttl", "2h"]):
        result, requests = _run(monkeypatch, *options)
        assert isinstance(result.exception, _Asked) and requests


@pytest.mark.parametrize(("arguments", "kl"), [([], 2.5e-4), (["--part-kl", "0"], 0.0)])
def test_how_far_a_part_may_be(monkeypatch: pytest.MonkeyPatch, arguments: list[str], kl: float) -> None:
    _, (request,) = _run(monkeypatch, *arguments)
    assert request.api.part_kl == kl


@pytest.mark.parametrize("kl", ["-1", "inf", "nan", "much"])
def test_a_part_that_may_be_anywhere_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, kl: str) -> None:
    result, requests = _run(monkeypatch, "--part-kl", kl)
    assert result.exit_code == 2 and not requests
    assert f"Invalid value for '--part-kl': '{kl}' is not a number of nats from 0" in result.output


def test_memory_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--running-memory", "3GiB", "--rebuilt-memory", "2GiB", "--tail-memory", "1MiB")
    result, (request,) = _run(monkeypatch, *sizes, "--prefix-memory", "5MiB", "--stored-tails", "0")
    assert isinstance(result.exception, _Asked)
    engine = request.engine
    assert (engine.running_bytes, engine.rebuilt_bytes, engine.tail_bytes) == (3 << 30, 2 << 30, 1 << 20)
    assert (request.prefix_bytes, engine.stored_tail_bytes) == (5 << 20, 0)
