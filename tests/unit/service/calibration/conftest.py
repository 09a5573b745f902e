"""A tiny model's prefills, and moments and a calibration of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from compressed import random_ids
from families import tiny_model
from measured import moments_of
from transformers import PreTrainedModel

from xkv_service.calibration.moments import Moments
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def prefills(model: PreTrainedModel) -> Iterator[list[Prefill]]:
    yield [prefill(model, random_ids(count, seed=count)) for count in (90, 37, 61)]


@pytest.fixture(scope="session")
def moments(prefills: list[Prefill]) -> Moments:
    return moments_of(prefills)
