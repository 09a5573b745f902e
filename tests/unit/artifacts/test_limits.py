"""Sizes and limits as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkv_artifacts.errors import InvalidLimits
from xkv_artifacts.limits import Limits, Quota, limits_of_file, parse_limits, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("1B", 1),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("100GB", 100 * 1000**3),
        ("100 GiB", 100 * 1024**3),
        ("1.5T", 1_500_000_000_000),
        ("2PiB", 2 * 1024**5),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "1XB", "1iB", "1 2", "nan", "١GB", "9" * 40])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(InvalidLimits, match="is not a size"):
        parse_size(text)


def test_a_namespace_has_its_own_quota_or_everybodys() -> None:
    content = b"""{"budget": "1TB", "each": {"bytes": "1GB", "artifacts": 5},
                   "namespaces": {"acme": {"bytes": 7}, "public": {}}}"""
    limits = parse_limits(content, "here")
    assert limits.budget == 10**12 and limits.quota("any") == Quota(bytes=10**9, artifacts=5)
    assert limits.quota("acme") == Quota(bytes=7)
    assert limits.quota("public").unlimited and not limits.quota("acme").unlimited
    assert parse_limits(b"{}", "here") == Limits() and Limits().quota("any").unlimited


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(InvalidLimits, match="larger than 1 MiB"):
        limits_of_file(tmp_path / "large")
    with pytest.raises(InvalidLimits, match="cannot read .*none: No such file"):
        limits_of_file(tmp_path / "none")
