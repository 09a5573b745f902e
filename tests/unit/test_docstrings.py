"""Every public module, class, function and method says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("xkv_service", "workers/xkv_workers", "cli/xkv_cli", "artifacts/xkv_artifacts")
INTERFACES = {"ABC", "Protocol"}


def undocumented(tree: ast.Module | ast.ClassDef, place: str) -> Iterator[str]:
    """What lacks a docstring; a method that a base class may describe already is left out."""
    if ast.get_docstring(tree) is None:
        yield place
    inherits = isinstance(tree, ast.ClassDef) and {ast.unparse(base) for base in tree.bases} - INTERFACES
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from undocumented(node, f"{place}.{node.name}")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not inherits:
            setter = any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
            yield from [] if setter or ast.get_docstring(node) else [f"{place}.{node.name}"]


def test_every_public_name_has_a_docstring() -> None:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 100
    missing = [name for path in paths for name in undocumented(ast.parse(path.read_text()), str(path))]
    assert missing == []
