"""What tests of several packages share: a tiny model on disk that every real code path can load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from model_folder import save_tiny_model

# Tests share the cores with Ray, Redis and each other; OpenMP's spinning threads would crawl. Read when torch
# is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many test processes as cores: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave long tests out, where they are not asked for."""
    if os.environ.get("XKV_LONG_TESTS", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: XKV_LONG_TESTS=1 make test runs it"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a byte tokenizer and a window of 2,048 tokens, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder
