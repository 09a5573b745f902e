"""The training tool's modules live in `tools/`, beside the script that uses them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
sys.path.insert(0, str(TOOLS))


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from xkv_service.demo import demo_model_path

    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="session")
def demo_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from xkv_service.demo import demo_model_path

    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
