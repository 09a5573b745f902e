"""A tiny model with its factors, lossless and at 4x."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, compress, enable_xkv
from xkv_service.factors import PrefixFactors

PREFIX = 48
LOSSLESS = CompressionSpec(
    group_size=2, rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32", index="sketch"
)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def prefix_ids() -> torch.Tensor:
    return random_ids(PREFIX)


@pytest.fixture(scope="session")
def lossless(model: PreTrainedModel, prefix_ids: torch.Tensor) -> PrefixFactors:
    return compress(model, prefix_ids, LOSSLESS)


@pytest.fixture(scope="session")
def lossy(model: PreTrainedModel, prefix_ids: torch.Tensor) -> PrefixFactors:
    return compress(model, prefix_ids, CompressionSpec(group_size=3, rank_k=24, rank_v=32))


@pytest.fixture
def enabled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    with torch.no_grad(), enable_xkv(model):
        yield model
