"""The README's Python does what it says, word for word, and nothing in the pages is left to fill in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import Xkv

from xkv_artifacts import ArtifactStore
from xkv_service import CompressionSpec
from xkv_service.modeling.models import load_model
from xkv_service.modeling.prompts import render_prefix

ROOT = Path(__file__).parents[2]


def snippets() -> tuple[str, str, str]:
    """README's blocks of Python, but the last, which needs a server: test_examples.py runs it."""
    page = (ROOT / "README.md").read_text()
    compressing, decoding, talking, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return compressing, decoding, talking


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_no_page_has_a_gap(page: str) -> None:
    assert not re.findall(r"@[A-Z0-9]+@|TODO|TBD", (ROOT / page).read_text())


def test_the_readmes_python_runs(xkv: Xkv, tiny_model: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("The river rises in the hills and ends in the sea. " * 20)
    store = tmp_path / "store"
    run = ["--model", tiny_model, "--ratio", "2", "--max-tokens", "1"]
    # Makes the artifact that precompute would make, without a worker.
    assert xkv("ask", "--doc", document, "--store", store, *run, "Why?").code == 0
    loaded = load_model(tiny_model, device="cpu")
    compressing, decoding, talking = snippets()
    prefix = render_prefix(loaded.tokenizer, document.read_text())
    names: dict[str, Any] = {"model": loaded.model, "tokenizer": loaded.tokenizer}
    names["text"] = document.read_text()
    exec(compressing.replace("ratio=8", "ratio=2"), names)
    assert names["input_ids"] == prefix
    assert names["factors"].spec == CompressionSpec(ratio=2)
    question = loaded.tokenizer("Why?").input_ids
    with ArtifactStore.open(str(store)) as opened:
        match = opened.lookup(loaded.identity.fingerprint, "default", [*prefix, *question])
    assert match is not None and match.tokens == len(prefix)
    names |= {
        "artifact_id": match.artifact_id,
        "ids": torch.tensor([question]),
        "mask": torch.ones(1, len(prefix) + len(question), dtype=torch.int64),
    }
    exec(decoding.replace("my-store", str(store)).replace("my-llama", str(tiny_model)), names)
    assert names["out"].shape[1] > len(question)
    assert names["cache"].get_seq_length() >= len(prefix) + len(question)
    exec(talking, names)
    assert names["reply"].cached_tokens == len(prefix) and len(names["session"].messages) == 4
