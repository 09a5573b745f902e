"""Tiny models that can talk, and a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import Talker, make_talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.modeling.models import load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower on many threads, far slower when tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path_factory.mktemp("store"))) as opened:
        yield opened


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def talkers(tokenizer: Any) -> Callable[[str], Talker]:
    """The talker of a family, made once."""
    return cache(lambda family: make_talker(family, tokenizer))


@pytest.fixture(scope="session")
def talker(talkers: Callable[[str], Talker]) -> Talker:
    return talkers("llama")
