"""The compose file names only things that exist: build targets, volumes, services and `xkv` options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_services_are_redis_head_server_and_gpu_worker(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"redis", "ray-head", "server", "ray-worker"}
    assert services["ray-worker"]["profiles"] == ["gpu"]
    (device,) = services["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]


def test_named_volumes_are_declared_and_the_store_is_shared(compose: dict[str, Any]) -> None:
    mounts = {
        name: [volume.rpartition(":/")[0] for volume in service.get("volumes", [])]
        for name, service in compose["services"].items()
    }
    named = {source for sources in mounts.values() for source in sources if not source.startswith("${")}
    assert named == set(compose["volumes"])
    assert all("store" in mounts[name] for name in ("ray-head", "server", "ray-worker"))


def test_build_targets_are_stages_of_the_dockerfile(compose: dict[str, Any]) -> None:
    stages = set(re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    targets = {s["build"]["target"] for s in compose["services"].values() if "build" in s}
    assert targets == {"cpu", "cuda"}
    assert targets <= stages


def test_every_dependency_is_a_service_with_a_health_check(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]


def test_the_command_in_its_comment_uses_options_that_xkv_has() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    (command,) = re.findall(r"exec ray-head xkv (.+)$", text, re.MULTILINE)
    name, *arguments = command.split()
    shown = subprocess.run(
        [sys.executable, "-m", "xkv_cli", name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in shown


def test_the_server_is_started_with_options_that_xkv_has(compose: dict[str, Any]) -> None:
    _, name, *arguments = compose["services"]["server"]["command"]
    shown = subprocess.run(
        [sys.executable, "-m", "xkv_cli", name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(option in shown for option in arguments if option.startswith("--"))


def test_every_folder_the_dockerfile_copies_exists() -> None:
    for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
