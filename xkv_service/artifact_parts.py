"""An artifact in parts, in the order that a forward needs them: what all layers need, then group by group."""

from __future__ import annotations

from xkv_artifacts.manifest import GroupLayout, PrefixManifest


def owners(number: int, group: GroupLayout) -> set[str]:
    """How the names of a group's tensors begin: its own, and its layers'."""
    return {f"group.{number}", *(f"layer.{layer}" for layer in group.layers)}


def owner_of(name: str) -> str:
    """How a tensor's name begins, as `owners` says it."""
    return ".".join(name.split(".")[:2])


def part_names(manifest: PrefixManifest) -> list[list[str]]:
    """The names of each part's tensors: what belongs to no group, then each group's. Every tensor once."""
    parts: list[list[str]] = [[] for _ in range(1 + len(manifest.groups))]
    part_of = {
        owner: number
        for number, group in enumerate(manifest.groups, 1)
        for owner in owners(number - 1, group)
    }
    for name in manifest.tensors:
        parts[part_of.get(owner_of(name), 0)].append(name)
    return parts
