"""An illegal access takes the device from its process: an engine ends with it. In a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_SCRIPT = """
import os, threading
import torch
from xkv_service.demo import demo_model_path
from xkv_service.engine.engine import NO_MEMORY, Engine
from xkv_service.engine.messages import Failed, Finished, GenerationRequest
from xkv_service.lost_device import is_lost
from xkv_service.modeling.models import load_model
from xkv_service.sessions.settings import GenerationSettings

loaded = load_model(demo_model_path(), device="cuda")
device = loaded.model.device

def answer(engine):
    told, ended = [], threading.Event()
    def hear(event):
        told.append(event)
        if isinstance(event, (Failed, Finished)):
            ended.set()
    engine.submit(GenerationRequest("1", tuple(range(5, 105)), GenerationSettings(max_new_tokens=4)), hear)
    assert ended.wait(120)
    return told[-1]

def no_memory(*_):
    torch.empty(2**45, dtype=torch.uint8, device=device)

def illegal(*_):
    torch.zeros(8, device=device)[torch.tensor([1000], device=device)].cpu()

died = []
engine = Engine(loaded, on_death=lambda: died.append(is_lost(device)))
assert isinstance(answer(engine), Finished)
hook = loaded.model.register_forward_pre_hook(no_memory)
assert answer(engine) == NO_MEMORY
hook.remove()
assert isinstance(answer(engine), Finished) and not died and not is_lost(device)
loaded.model.register_forward_pre_hook(illegal)
assert answer(engine).message == "the engine that answered died"
engine.close()
assert died == [True]
print("it ended", flush=True)
os._exit(0)  # the device is gone: nothing can be put away
"""


def test_an_engine_ends_with_its_device() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300)
    assert "it ended" in done.stdout, done.stderr[-3000:]
