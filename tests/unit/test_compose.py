"""The compose file names only things that exist: build targets, volumes, services and `xkv` options.

`tests/e2e/test_compose.py` runs its commands.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from xkv_workers.serving.proxy_guard import CALLBACK, VARIABLE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_services_are_redis_a_head_workers_the_server_and_a_job(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"redis", "ray-head", "worker", "gpu-worker", "server", "precompute"}
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"gpu-worker": ["gpu"], "precompute": ["precompute"]}
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]


def test_all_join_one_ray_and_drivers_give_it_nothing_to_run_on(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert "--port=6380" in services["ray-head"]["command"]
    for name in ("worker", "gpu-worker"):
        assert "--address=ray-head:6380" in services[name]["command"]
    for name in ("server", "precompute"):
        assert (
            "ray start --address=ray-head:6380 --num-cpus=0 --num-gpus=0" in services[name]["entrypoint"][2]
        )
        assert "--ray-address auto" in " ".join(services[name]["command"])
    assert "ports" in services["ray-head"] and "ports" not in services["server"], "Serve listens on the head"
    assert services["ray-head"]["environment"][VARIABLE] == CALLBACK


def test_a_gpu_worker_is_a_worker_with_gpus(compose: dict[str, Any]) -> None:
    worker, gpu = (deepcopy(compose["services"][name]) for name in ("worker", "gpu-worker"))
    assert gpu.pop("profiles") == ["gpu"]
    assert (worker.pop("image"), gpu.pop("image")) == ("xkv-service:cpu", "xkv-service:cuda")
    cpu_build, cuda_build = worker.pop("build"), gpu.pop("build")
    assert cpu_build.pop("target") == "cpu" and cuda_build.pop("target") == "cuda"
    assert "cpu" in cpu_build.pop("args")["TORCH_INDEX"], "CUDA's torch comes from the default index"
    assert cpu_build == cuda_build
    assert worker.pop("deploy") == {"replicas": 2} and set(gpu.pop("deploy")) == {"resources"}
    limits = [word for word in worker["command"] if word.startswith(("--num-cpus", "--num-gpus"))]
    assert limits == ["--num-cpus=${XKV_WORKER_CPUS:-2}", "--num-gpus=0"], "the other one gives all it has"
    assert [word for word in worker.pop("command") if word not in limits] == gpu.pop("command")
    assert worker == gpu


def test_what_is_scaled_publishes_no_port_and_has_no_name(compose: dict[str, Any]) -> None:
    for name in ("worker", "gpu-worker"):
        assert not {"ports", "container_name", "hostname"} & set(compose["services"][name])


def test_secrets_are_named_and_not_written_down(compose: dict[str, Any]) -> None:
    server = compose["services"]["server"]["environment"]
    assert [server[name] for name in ("XKV_API_KEYS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")] == [None] * 3
    for name in ("ray-head", "worker", "gpu-worker", "server", "precompute"):
        environment = compose["services"][name]["environment"]
        assert "${XKV_REDIS_PASSWORD:-}@redis:6379" in environment["XKV_REDIS_URL"]
        assert "XKV_API_KEYS" not in environment or name == "server"


def test_the_server_knows_where_its_port_is_published_and_opens_it_for_nobody(
    compose: dict[str, Any],
) -> None:
    head, server = compose["services"]["ray-head"], compose["services"]["server"]
    command = server["command"]
    published = command[command.index("--published") + 1]
    assert head["ports"] == [f"{published}:8000:8000"] and published == "${XKV_ADDRESS:-127.0.0.1}"
    assert "--open-network" not in command and server["environment"]["XKV_OPEN_NETWORK"] is None


def test_the_servers_health_check_names_this_machine_as_its_clients_do(compose: dict[str, Any]) -> None:
    kind, _, *words = compose["services"]["server"]["healthcheck"]["test"]
    asked: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Host"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as listener:
        here = f"127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.handle_request)
        thread.start()
        subprocess.run([sys.executable, *(w.replace("ray-head:8000", here) for w in words)], check=True)
        thread.join()
    assert kind == "CMD" and asked == ["localhost"]


def test_named_volumes_are_declared_and_the_store_is_shared(compose: dict[str, Any]) -> None:
    mounts = {
        name: [volume.rpartition(":/")[0] for volume in service.get("volumes", [])]
        for name, service in compose["services"].items()
    }
    by_default = {re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", one) for sources in mounts.values() for one in sources}
    assert {one for one in by_default if not one.startswith(".")} == set(compose["volumes"])
    assert all("store" in mounts[name] for name in ("worker", "gpu-worker", "server", "precompute"))


def test_all_that_load_a_model_find_the_same_one(compose: dict[str, Any]) -> None:
    for name in ("ray-head", "worker", "gpu-worker", "server", "precompute"):  # the head has the tokenizer
        service = compose["services"][name]
        assert "${XKV_MODELS:-models}:/models" in service["volumes"]
        assert service["environment"]["XKV_MODEL"] is service["environment"]["HF_TOKEN"] is None
        assert service["environment"]["HF_HOME"].startswith("/models/")


def test_build_targets_are_stages_of_the_dockerfile(compose: dict[str, Any]) -> None:
    stages = set(re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    targets = {s["build"]["target"] for s in compose["services"].values() if "build" in s}
    assert targets == {"cpu", "cuda"}
    assert targets <= stages


def test_the_image_for_gpus_has_the_c_compiler_that_triton_needs() -> None:
    stages = re.split(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = dict(zip(stages[1::2], stages[2::2], strict=True))
    installed = {
        name: re.findall(r"apt-get install (?:--\S+ )*(.+?) *\\$", text, re.MULTILINE)
        for name, text in lines.items()
    }
    assert installed == {"base": [], "cpu": [], "cuda": ["gcc libc6-dev"]}
    assert re.findall(r"^USER (\w+)$", lines["cuda"], re.MULTILINE)[-1] == "xkv", "workers are not root"


def test_every_dependency_is_a_service_with_a_health_check(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition["condition"] == "service_healthy"
            assert "healthcheck" in services[name]


@pytest.mark.parametrize("service", ["server", "precompute"])
def test_commands_have_options_that_xkv_has(compose: dict[str, Any], service: str) -> None:
    name, *arguments = compose["services"][service]["command"]
    shown = subprocess.run(
        [sys.executable, "-m", "xkv_cli", name, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(option in shown for option in arguments if option.startswith("--"))


def test_every_folder_the_dockerfile_copies_exists() -> None:
    for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
