"""The pinned versions can be installed on every Python that the project allows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LINES = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_each_package_has_one_version_that_this_python_takes(python: str) -> None:
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name.lower() for pin in pins}) == len(pins)
    for pin in pins:
        try:
            found = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if pin.specifier.contains(found["Version"]):
            assert SpecifierSet(found["Requires-Python"] or "").contains(f"{python}.13"), pin
