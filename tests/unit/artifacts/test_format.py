"""A blob gives back what was written, is ordinary safetensors, and is read no further than asked."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from artifact_samples import sample
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_artifacts import checked_file
from xkv_artifacts import format as blob_format
from xkv_artifacts.errors import CorruptArtifact, MissingTensor
from xkv_artifacts.format import read_manifest, read_prefix, read_tokens, verify, write_prefix

DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
shapes = st.lists(st.integers(0, 5), max_size=4)


def written(**changes: object) -> bytes:
    file = io.BytesIO()
    write_prefix(file, *sample(**changes))  # type: ignore[arg-type]
    return file.getvalue()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape
        assert tensor.flatten().view(torch.uint8).tolist() == right[name].flatten().view(torch.uint8).tolist()


names = st.from_regex(r"[a-z]{1,8}(\.[0-9]{1,3}){0,2}", fullmatch=True)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=6))
def test_any_tensors_come_back_bit_for_bit(described: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    manifest, tensors = sample()
    for name, (dtype, shape) in described.items():
        raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
        tensors.setdefault(
            name, raw.view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)
        )
    file = io.BytesIO()
    complete = write_prefix(file, manifest, tensors)
    found, read = read_prefix(file)
    assert found == complete == read_manifest(file) == verify(file)
    assert_same(read, tensors)


def test_the_same_input_makes_the_same_bytes() -> None:
    manifest, tensors = sample()
    backwards = dict(reversed(tensors.items()))
    files = io.BytesIO(), io.BytesIO()
    write_prefix(files[0], manifest, tensors)
    write_prefix(files[1], manifest, backwards)
    assert files[0].getvalue() == files[1].getvalue()


def test_tensors_of_any_stride_are_written_as_they_look() -> None:
    manifest, tensors = sample()
    tensors["t"] = torch.arange(12.0).reshape(3, 4).T[1:, ::2].requires_grad_()
    file = io.BytesIO()
    write_prefix(file, manifest, tensors)
    assert torch.equal(read_prefix(file, ["t"])[1]["t"], tensors["t"])


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "blob.safetensors"
    path.write_bytes(written())
    assert_same(safetensors.torch.load_file(path), sample()[1])
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["xkv"]


def test_every_tensor_is_aligned_to_its_elements() -> None:
    manifest, header = blob_format._open(io.BytesIO(written()))
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1}
    assert all(info.start % sizes[info.dtype] == 0 for info in header.tensors.values())
    assert min(info.start for info in header.tensors.values()) % 8 == 0


class Recording(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self.count += len(part)
        return part

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        size = super().readinto(buffer)
        self.count += size
        return size


def test_only_the_ranges_of_the_named_tensors_are_read() -> None:
    blob = written(token_ids=range(5000))
    header_bytes = 8 + int.from_bytes(blob[:8], "little")
    file = Recording(blob)
    names = ["group.0.key.factors.1", "group.0.key.bases.1"]
    _, tensors = read_prefix(file, names)
    assert list(tensors) == names
    assert file.count == header_bytes + sum(t.nbytes for t in tensors.values()) < len(blob) / 10
    assert read_prefix(file, [])[1] == {}


def test_tensors_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_file, "CHUNK_BYTES", 7)
    blob = written()
    assert_same(read_prefix(io.BytesIO(blob))[1], sample()[1])
    verify(io.BytesIO(blob))


def test_tokens_are_read_without_torch() -> None:
    manifest, tokens = read_tokens(io.BytesIO(written(token_ids=[5, 6, 70000])))
    assert (manifest.tokens, tokens.hex()) == (3, "050000000600000070110100")


def test_a_name_that_is_not_there_is_named() -> None:
    with pytest.raises(MissingTensor, match="no tensor group.9"):
        read_prefix(io.BytesIO(written()), ["tokens", "group.9"])


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("tokens", torch.arange(99, dtype=torch.int32), "I32 of shape"),
        ("tokens", torch.arange(100), "I32 of shape"),
        ("tokens", torch.arange(1, 101, dtype=torch.int32), "is not that of this model"),
        ("../x", torch.zeros(1), "name '../x' is not allowed"),
        ("a b", torch.zeros(1), "not allowed"),
        ("flags", torch.zeros(1, dtype=torch.bool), "dtype bool cannot be stored"),
        ("__metadata__", torch.zeros(1), "does not begin"),
    ],
)
def test_what_does_not_fit_together_is_not_written(name: str, tensor: torch.Tensor, reason: str) -> None:
    manifest, tensors = sample()
    file = io.BytesIO()
    with pytest.raises(CorruptArtifact, match=reason):
        write_prefix(file, manifest, {**tensors, name: tensor})
    assert file.getvalue() == b""


def test_nothing_in_the_package_imports_torch() -> None:
    code = (
        "import pkgutil, importlib, sys, xkv_artifacts as p\n"
        "for m in pkgutil.iter_modules(p.__path__): importlib.import_module(f'xkv_artifacts.{m.name}')\n"
        "print([m for m in ('torch', 'numpy', 'ray', 's3fs', 'botocore') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
