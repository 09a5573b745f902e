"""Says that the kernels' tests do not run, where they do not."""

from __future__ import annotations

import importlib.util

import pytest


def test_triton_is_there_or_nothing_else_is_collected() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: docs/kernels.md says how to run the tests of kernels")
    from xkv_service.kernels import decode_attention

    assert decode_attention.DecodeAttention.__doc__
