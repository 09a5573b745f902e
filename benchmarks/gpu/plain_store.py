"""Blobs of one folder without a catalog: what of `ArtifactStore` runs where there is no Redis server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xkv_artifacts.blobs import blob_name, open_blob_store
from xkv_artifacts.checked_prefixes import CheckedPrefixes
from xkv_artifacts.format import write_prefix
from xkv_artifacts.manifest import PrefixManifest


class PlainStore:
    """Publishes and loads as `ArtifactStore` does, but for the catalog's entries and readers' marks.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.blobs = open_blob_store(str(root))
        checked = CheckedPrefixes(self.blobs, lambda artifact_id: None, lambda artifact_id, manifest: None)
        self.manifest, self.load_parts = checked.read_manifest, checked.read_parts
        self._root = root

    def publish(
        self, manifest: PrefixManifest, tensors: Mapping[str, torch.Tensor], **promised: Any
    ) -> PrefixManifest:
        """Write a blob; as `ArtifactStore.publish`."""
        return self.blobs.put(manifest.id, lambda file: write_prefix(file, manifest, tensors))

    def path(self, artifact_id: str) -> Path:
        """A blob's file."""
        return self._root / blob_name(artifact_id)
