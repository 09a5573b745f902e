"""The bundled model, loaded once."""

from __future__ import annotations

import pytest

from xkv_service.demo import demo_model_path
from xkv_service.modeling.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def bundled() -> LoadedModel:
    return load_model(demo_model_path(), device="cpu")
