"""What keeps a server from starting is said before Ray is started."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from artifact_samples import sample
from click.testing import CliRunner

from xkv_artifacts.errors import InvalidLimits
from xkv_artifacts.store import ArtifactStore
from xkv_cli.main import xkv
from xkv_service.api.keys import Key, KeyRing
from xkv_service.engine.settings import EngineSettings
from xkv_service.errors import InvalidSpec
from xkv_workers.serving.server import ServeRequest, serving, unread, unrebuilt


def test_limits_that_cannot_be_read(tmp_path: Path, unused_port: int) -> None:
    with ArtifactStore.open(str(tmp_path)):
        (tmp_path / "limits.json").write_text('{"budget": "many"}')
    said = r"limits.json: budget: .*'many' is not a size"
    with (
        pytest.raises(InvalidLimits, match=said) as caught,
        serving(ServeRequest(str(tmp_path), port=unused_port)),
    ):
        pass
    assert caught.value.hint == "docs/retention.md shows how it looks"


@pytest.mark.parametrize("alias", ["", " ", "a\u001bb", "x" * 257])
def test_an_alias_that_nobody_could_ask_for(tmp_path: Path, alias: str) -> None:
    with pytest.raises(InvalidSpec, match="is no name for a model"):
        ServeRequest(str(tmp_path), aliases=("gpt-4o", alias))
    result = CliRunner().invoke(xkv, ["serve", "--store", str(tmp_path), "--alias", alias])
    assert result.exit_code == 2 and "--alias" in result.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--keys", __file__], "is not JSON"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and there are no keys"),
        (["--published", "0.0.0.0"], "--published 0.0.0.0 lets other machines in, and there are no keys"),
        (["--host", "0.0.0.0", "--published", "192.168.1.5"], "--published 192.168.1.5 lets other machines"),
        (["--host", "0.0.0.0", "--published", "[::1]", "--redis", "redis://h:port"], "not a Redis URL"),
        (["--published", "0.0.0.0", "--open-network", "--redis", "redis://h:port"], "not a Redis URL"),
        (["--redis", "redis://h:port"], "not a Redis URL"),
    ],
)
def test_what_is_wrong_is_said_before_torch_and_ray_are_imported(
    tmp_path: Path, unused_port: int, options: list[str], expected: str
) -> None:
    program = (
        "import atexit, sys; from xkv_cli.main import main;"
        "atexit.register(lambda: print([name for name in ('torch', 'ray') if name in sys.modules]));"
        "sys.argv[0] = 'xkv'; main()"
    )
    command = [sys.executable, "-c", program, "serve", "--store", tmp_path, "--port", str(unused_port)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and expected in done.stderr, done
    assert done.stdout == "[]\n"


def test_prefixes_that_no_key_uses_are_told(tmp_path: Path) -> None:
    def keys(*namespaces: str) -> KeyRing:
        return KeyRing(tuple(Key(name=one, sha256="0" * 64, namespace=one) for one in namespaces))

    with ArtifactStore.open(str(tmp_path)) as store:
        store.publish(*sample(range(100), namespace="public"))
        assert unread(store, keys("shop")) is None
        store.publish(*sample(range(100), namespace="default"))
        assert "no key uses the prefixes of namespace default" in str(unread(store, keys("shop")))
        assert unread(store, keys("shop", "default")) is None and unread(store, keys()) is None
        name = store.catalog.namespaces.key("default")
        store.catalog.link.call(lambda client: (client.delete(name), client.set(name, "junk")))
        assert unread(store, keys("shop")) is None


def test_memory_for_what_a_cpu_does_not_rebuild_is_told() -> None:
    asked = ServeRequest("store", engine=EngineSettings(rebuilt_bytes=2**30))
    assert str(unrebuilt(asked, "cpu")).startswith(
        "--rebuilt-memory does nothing here: the engines run on CPUs"
    )
    assert unrebuilt(asked, "cuda") is None and unrebuilt(ServeRequest("store"), "cpu") is None


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
