"""One Ray for all end-to-end tests, and the `xkv` command run in this process or in its own."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from command_runs import PATIENT_RAY, Done, words

# The shared cluster's; Ray reads it when it is imported. Rays that commands start themselves have a token.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Of servers: what they are asked for here is stored, and the machine may be busy.
os.environ["XKV_LOOKUP_TIMEOUT"] = "60s"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of workers that share them none waits long for the last one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster of one node with room for two workers, as "host:port"."""
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += ["--num-cpus=2", "--include-dashboard=false", "--object-store-memory=100000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any that is free: there may be other clusters
    command += ["--include-log-monitor=false"]
    # Each driver would have two workers started beforehand, most of them for nothing.
    environment = {**os.environ, **PATIENT_RAY, "RAY_prestart_worker_first_driver": "0"}
    began = time.monotonic()
    while time.monotonic() - began < 600:  # on a slow machine not every start ends in the 30 s it is given
        with log.open("w") as output:
            head = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            if address := find_address(log, head):
                yield address
                return
        finally:
            head.terminate()
            head.wait(120)
    raise AssertionError(f"Ray did not start:\n{log.read_text()}")


def find_address(log: Path, head: subprocess.Popen[bytes]) -> str | None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and head.poll() is None:
        if found := re.search(r"--address='([^']+)'", log.read_text()):
            return found[1]
        time.sleep(0.1)
    return None


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XKV_STORE", "XKV_REDIS_URL", "XKV_MODEL", "XKV_DEBUG", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def xkv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command as the console script does, but in this process: torch and Ray are imported once."""

    def run(*arguments: object) -> Done:
        from xkv_cli.main import main

        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["xkv", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three small documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b.md", "c.rst")):
        (folder / name).write_text(words(300 + 150 * number, seed=number))
    return folder
