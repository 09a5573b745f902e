"""Kernels of decoding run where Triton is installed: on a GPU, or in Triton's interpreter without one.

Triton is no dependency of the project: it weighs 640 MB, and PyTorch brings it along where there is a GPU.
To run these tests on a CPU (the interpreter of Triton 3.6 fails with NumPy 2.4):

    pip install --target FOLDER triton==3.6.0 'numpy<2.4'
    PYTHONPATH=FOLDER pytest tests/unit/service/kernels
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from xkv_service.decoding import kernel_choice

pytest.register_assert_rewrite("launch_checks")
MISSING = importlib.util.find_spec("triton") is None
HERE = Path(__file__).parent
collect_ignore = [one.name for one in HERE.glob("test_*.py") if MISSING and one.stem != "test_available"]

if not MISSING and not torch.cuda.is_available():
    # Read when Triton is imported, which others may have done already; its compiled part loads once only.
    os.environ["TRITON_INTERPRET"] = "1"
    loaded = [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes 8 s and changes no result; the tests of it turn it on."""
    monkeypatch.setattr(kernel_choice, "COMPILES", False)
