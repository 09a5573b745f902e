"""`Origin`: with its tokens, all that it takes to make an artifact again under the same id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xkv_artifacts.manifest import PrefixManifest


@dataclass(frozen=True)
class Origin:
    """What an artifact was made from, as its manifest or the catalog says.

    Args:
        namespace: whose it is. spec: `CompressionSpec.canonical()`, not checked. tokens: how many it holds.
        name, sha256: of its document.
    """

    namespace: str
    spec: dict[str, Any]
    tokens: int
    name: str
    sha256: str

    @classmethod
    def of_manifest(cls, manifest: PrefixManifest) -> Origin:
        """As the blob itself says."""
        document = manifest.document
        return cls(manifest.namespace, manifest.spec, manifest.tokens, document.uri, document.sha256)
