"""Ids are the same everywhere and always, and differ whenever anything differs."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_artifacts.errors import InvalidKey, InvalidNamespace
from xkv_artifacts.keys import (
    BLOCK_TOKENS,
    DIGEST_BYTES,
    artifact_id,
    check_namespace,
    joined_block_hashes,
    token_bytes,
)

FINGERPRINT = "ab" * 32
SPEC = {"ratio": 8.0, "group_size": 4, "rank_k": None, "index": "sketch"}
# Printed once by this code: a change of either orphans every stored artifact.
KNOWN_ID = "17998d397c546e1f9ecc83ca013fe25de7805052320624218be817db39f2dad6"
KNOWN_BLOCK = "6e1ce26d44e80468"

token_lists = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=300)


def block_hashes(namespace: str, ids: Sequence[int]) -> list[bytes]:
    joined = joined_block_hashes(FINGERPRINT, namespace, token_bytes(ids))
    return [joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)]


def test_id_and_block_hash_are_the_ones_of_every_earlier_day() -> None:
    assert artifact_id(FINGERPRINT, "default", range(200), SPEC) == KNOWN_ID
    assert block_hashes("default", range(200))[2].hex() == KNOWN_BLOCK


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_ids_are_the_same_in_another_process_with_another_hash_seed(seed: str) -> None:
    code = (
        "from xkv_artifacts.keys import artifact_id;"
        f"print(artifact_id('{FINGERPRINT}', 'default', range(200), {dict(reversed(SPEC.items()))!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == KNOWN_ID


@pytest.mark.parametrize(
    "changed",
    [
        ("cd" * 32, "default", range(200), SPEC),
        (FINGERPRINT, "defaulT", range(200), SPEC),
        (FINGERPRINT, "default", range(201), SPEC),
        (FINGERPRINT, "default", [*range(199), 7], SPEC),
        (FINGERPRINT, "default", range(200), {**SPEC, "ratio": 8.5}),
        (FINGERPRINT, "default", range(200), {**SPEC, "more": None}),
    ],
)
def test_any_changed_part_changes_the_id(changed: tuple) -> None:  # type: ignore[type-arg]
    assert artifact_id(*changed) != KNOWN_ID


def test_whole_numbers_are_the_same_setting_as_integers() -> None:
    assert artifact_id(FINGERPRINT, "default", range(200), {**SPEC, "ratio": 8}) == KNOWN_ID


@settings(deadline=None)
@given(token_lists, token_lists)
def test_block_hashes_agree_exactly_as_far_as_the_tokens_do(left: list[int], right: list[int]) -> None:
    right = left[: len(left) // 2] + right
    common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
    common = min(len(left), len(right)) if common is None else common
    hashes = block_hashes("n", left), block_hashes("n", right)
    equal = [a == b for a, b in zip(*hashes, strict=False)]
    assert equal == [(block + 1) * BLOCK_TOKENS <= common for block in range(len(equal))]
    assert all(len(digest) == 8 and digest[0] < 0x80 for digest in hashes[0])


@pytest.mark.parametrize("name", ["default", "a", "A-1_b.c", "...", "x" * 64])
def test_safe_namespaces_pass(name: str) -> None:
    assert check_namespace(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "a b", "a\n", "é", "x" * 65, "a:b", "a*", "\x00", "٣"]
)
def test_other_namespaces_are_refused(name: str) -> None:
    with pytest.raises(InvalidNamespace, match="not allowed"):
        artifact_id(FINGERPRINT, name, [1], SPEC)


ARRAYS: dict[str, Callable[[list[int]], Any]] = {
    "array of int32": lambda ids: array("i", ids),
    "array of int64": lambda ids: array("q", ids),
    "memoryview": lambda ids: memoryview(array("i", ids)),
    "NumPy int32": lambda ids: numpy.array(ids, dtype="int32"),
    "NumPy int64": lambda ids: numpy.array(ids, dtype="int64"),
    "NumPy, most significant byte first": lambda ids: numpy.array(ids, dtype=">i8"),
    "NumPy, every third of a read-only one": lambda ids: read_only(numpy.array(ids).repeat(3))[::3],
    "torch int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "torch int64": lambda ids: torch.tensor(ids, dtype=torch.int64),
    "torch, every second": lambda ids: torch.tensor(ids, dtype=torch.int64).repeat_interleave(2)[::2],
}


def read_only(ids: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    ids.flags.writeable = False
    return ids


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("ids", [[7], [*range(300)], [0, 255, 256, 65_536, 2**31 - 1], [2**31 - 1, 0]])
def test_an_array_makes_the_bytes_of_the_list(kind: str, ids: list[int]) -> None:
    assert (
        token_bytes(ARRAYS[kind](ids)) == token_bytes(ids) == b"".join(i.to_bytes(4, "little") for i in ids)
    )


@pytest.mark.parametrize("make", [numpy.array, torch.tensor])
def test_no_tokens_of_an_integer_dtype_are_no_bytes(make: Callable[..., Any]) -> None:
    dtype = numpy.int64 if make is numpy.array else torch.int64
    assert token_bytes(make([], dtype=dtype)) == token_bytes([]) == b""


@pytest.mark.parametrize("ids", [[1, -1], [-(2**31), 5]])
@pytest.mark.parametrize("kind", ["list", *ARRAYS])
def test_negative_ids_are_named(kind: str, ids: list[int]) -> None:
    with pytest.raises(InvalidKey, match=f"token id {min(ids)} is negative"):
        token_bytes(ARRAYS.get(kind, list)(ids))


@pytest.mark.parametrize("ids", [[1, 2**31], [2**32 + 1], [2**63 - 1]])
@pytest.mark.parametrize("kind", ["list", *(kind for kind in ARRAYS if kind.endswith("int64"))])
def test_ids_that_32_bits_do_not_hold_are_refused(kind: str, ids: list[int]) -> None:
    with pytest.raises(InvalidKey, match="not 32-bit integers"):
        token_bytes(ARRAYS.get(kind, list)(ids))


@pytest.mark.parametrize(
    "ids",
    [
        numpy.array([1.0]),
        numpy.array([True]),
        numpy.array([1], dtype="int16"),
        numpy.array([1], dtype="uint32"),
        numpy.array([[1, 2]]),
        numpy.array(1),
        numpy.array(["1"]),
        numpy.array([1, None]),
        array("d", [1.0]),
        torch.tensor([1.0]),
        torch.tensor([1.0], requires_grad=True),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.tensor([True]),
        torch.tensor([[1, 2]]),
        torch.tensor(1),
        torch.tensor([1]).to_sparse(),
        torch.tensor([1], device="meta"),
        b"\x01\x00\x00\x00",
        "1234",
    ],
    ids=repr,
)
def test_arrays_of_anything_else_are_refused(ids: Any) -> None:
    with pytest.raises(InvalidKey, match="token ids are"):
        token_bytes(ids)


@pytest.mark.parametrize(
    ("tokens", "spec", "fingerprint"),
    [
        ([], SPEC, FINGERPRINT),
        ([-1], SPEC, FINGERPRINT),
        ([2**31], SPEC, FINGERPRINT),
        ([1.5], SPEC, FINGERPRINT),
        (["1"], SPEC, FINGERPRINT),
        ([1], {"ratio": float("nan")}, FINGERPRINT),
        ([1], {"ratio": float("inf")}, FINGERPRINT),
        ([1], {"ratio": object()}, FINGERPRINT),
        ([1], {1: 2}, FINGERPRINT),
        ([1], SPEC, "short"),
        ([1], SPEC, "AB" * 32),
    ],
)
def test_what_no_key_can_be_made_from_is_refused(tokens: list, spec: dict, fingerprint: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidKey):
        artifact_id(fingerprint, "default", tokens, spec)
