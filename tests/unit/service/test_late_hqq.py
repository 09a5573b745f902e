"""hqq is imported when a quantized cache is made, not when Transformers is."""

from __future__ import annotations

import subprocess
import sys

_PROCESS = """
import inspect, sys
from xkv_service.modeling.late_hqq import put_off_hqq

put_off_hqq()
import torch
from transformers.cache_utils import HQQQuantizedLayer

inspect.getmodule(inspect.currentframe())  # looks at every module that is there
assert not [name for name in sys.modules if name.startswith("hqq") and name != "hqq.core.quantize"]
layer = HQQQuantizedLayer(nbits=8, axis_key=1, axis_value=1, q_group_size=16)
keys = torch.randn(1, 2, 8, 16)
layer.update(keys, keys)
assert "hqq.core" in sys.modules
assert (layer._dequantize(layer._quantized_keys) - keys).abs().max() < 0.02

from hqq.core.quantize import HQQLinear, Quantizer

assert HQQLinear.__module__ == Quantizer.__module__ == "hqq.core.quantize"
"""


def test_hqq_is_imported_at_its_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
