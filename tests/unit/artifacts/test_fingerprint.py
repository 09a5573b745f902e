"""Any byte that can change what a model computes changes its fingerprint; its folder does not."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from xkv_artifacts import fingerprint as module
from xkv_artifacts.errors import ModelFilesError
from xkv_artifacts.fingerprint import digest_model, fingerprint_files

FILES = {
    "config.json": b'{"hidden_size": 8}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 8192,
    "model-00002-of-00002.safetensors": b"\x01" * 100,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool_use.jinja": b"{{ y }}",
    "custom_code.py": b"pass",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    """Make files look older than the moment in which a digest is not yet kept."""
    for path in folder.rglob("*"):
        os.utime(path, (1_000_000, 1_000_000))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The change time cannot be set back, so "settled" is made to be at once.
    monkeypatch.setattr(module, "_SETTLED_SECONDS", -1.0)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_in_any_file_changes_it(model: Path, cache: Path, name: str) -> None:
    before = fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(content)
    assert fingerprint_files(model, dtype="bfloat16", cache_dir=cache) != before


PARTS = {"weights": 3, "tokenizer": 5, "config": 2}
"""Of `FILES`, how many are in each."""


def test_each_file_is_in_one_part(model: Path, cache: Path) -> None:
    whole, before = digest_model(model, dtype="bfloat16", cache_dir=cache)
    assert whole == fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    assert digest_model(model, dtype="float16", cache_dir=cache)[1] == before
    counted = dict.fromkeys(PARTS, 0)
    for name, content in FILES.items():
        (model / name).write_bytes(content + b" ")
        after = digest_model(model, dtype="bfloat16", cache_dir=cache)[1]
        (part,) = [one for one in PARTS if getattr(after, one) != getattr(before, one)]
        counted[part] += 1
        before = after
    assert counted == PARTS


def test_dtype_names_and_added_files_change_it(model: Path, cache: Path) -> None:
    def now(dtype: str = "bfloat16") -> str:
        return fingerprint_files(model, dtype=dtype, cache_dir=cache)

    before = now()
    assert now("float16") != before
    assert now("torch.bfloat16") == before
    (model / "chat_template.jinja").rename(model / "chat_templatf.jinja")
    assert now() != before
    (model / "chat_templatf.jinja").rename(model / "chat_template.jinja")
    assert now() == before
    (model / "additional_chat_templates" / "rag.jinja").write_text("z")
    assert now() != before


def test_the_same_files_elsewhere_and_through_links_give_the_same(
    model: Path, cache: Path, tmp_path: Path
) -> None:
    before = fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    shutil.copytree(model, tmp_path / "copy")
    assert fingerprint_files(tmp_path / "copy", dtype="bfloat16", cache_dir=cache) == before
    (tmp_path / "snapshot").mkdir()
    for path in model.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    (tmp_path / "snapshot" / ".loop").symlink_to(tmp_path)
    assert fingerprint_files(tmp_path / "snapshot", dtype="bfloat16", cache_dir=cache) == before


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "generation_config.json", ".gitattributes", ".git/x"]
)
def test_papers_and_sampling_defaults_do_not_count(model: Path, cache: Path, name: str) -> None:
    before = fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("anything")
    assert fingerprint_files(model, dtype="bfloat16", cache_dir=cache) == before


def test_large_files_are_read_once_and_again_after_a_change(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = module._sha256_of
    monkeypatch.setattr(module, "_sha256_of", lambda path: read.append(path.name) or real(path))  # type: ignore[func-returns-value]
    large = "model-00001-of-00002.safetensors"
    first = fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    assert large in read
    read.clear()
    assert fingerprint_files(model, dtype="bfloat16", cache_dir=cache) == first
    assert large not in read
    # Same size, same inode, and the old modification time put back: the change time still tells.
    time.sleep(0.02)
    with (model / large).open("r+b") as file:
        file.write(b"\xff")
    os.utime(model / large, (1_000_000, 1_000_000))
    assert fingerprint_files(model, dtype="bfloat16", cache_dir=cache) != first


def test_a_file_changed_just_now_is_not_remembered(model: Path, tmp_path: Path) -> None:
    fingerprint_files(model, dtype="bfloat16", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe", b'{"key": [], "sha256": 5}']
)
def test_a_damaged_cache_file_is_ignored(model: Path, cache: Path, damage: bytes) -> None:
    before = fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
    (record,) = cache.glob("*.json")
    record.write_bytes(damage)
    assert fingerprint_files(model, dtype="bfloat16", cache_dir=cache) == before


def test_a_cache_that_cannot_be_written_is_no_error(model: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert len(fingerprint_files(model, dtype="bfloat16", cache_dir=cache)) == 64


@pytest.mark.parametrize(
    ("remove", "reason"),
    [("config.json", "no config.json"), ("*.safetensors", "no weight files"), (".", "not a folder")],
)
def test_incomplete_folders_are_refused(model: Path, cache: Path, remove: str, reason: str) -> None:
    if remove == ".":
        shutil.rmtree(model)
    else:
        for path in model.glob(remove):
            path.unlink()
    with pytest.raises(ModelFilesError, match=reason):
        fingerprint_files(model, dtype="bfloat16", cache_dir=cache)
