"""The longest stored prefix of a prompt: the catalog proposes, the blobs' own token ids decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.checked_prefixes import CheckedPrefixes
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, MissingBlob, UnsupportedFormat
from xkv_artifacts.keys import check_namespace, token_bytes
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.prefix_index import common_tokens
from xkv_artifacts.reports import Match
from xkv_artifacts.token_cache import OwnedTokens, TokenCache

if TYPE_CHECKING:
    from xkv_artifacts.keys import TokenIds

OnLost: TypeAlias = Callable[[str, "ArtifactNotFound | CorruptArtifact"], None]
"""Told the id of an artifact that cannot be had, and why: a plain ArtifactNotFound where another process or
thread has unlisted it meanwhile."""


class PrefixLookup:
    """Lookups in one store."""

    def __init__(self, blobs: BlobStore, catalog: Catalog, checked: CheckedPrefixes) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._checked = checked
        self._tokens = TokenCache()

    def find(
        self,
        fingerprint: str,
        namespace: str,
        token_ids: TokenIds,
        *,
        whole: bool,
        on_lost: OnLost | None = None,
    ) -> Match | None:
        """See `ArtifactStore.lookup`."""
        prompt = token_bytes(token_ids)
        owner = (fingerprint, check_namespace(namespace))
        ask = self._catalog.whole_candidates if whole else self._catalog.candidates
        while True:
            candidates = ask(*owner, prompt)
            matches = []
            for artifact_id in candidates:
                try:
                    matches.append(self._match(artifact_id, owner, prompt, whole=whole))
                except (CorruptArtifact, MissingBlob) as error:
                    self._catalog.drop(artifact_id)
                    if on_lost is not None:
                        on_lost(artifact_id, error)
                except ArtifactNotFound as error:
                    if self._blobs.exists(artifact_id):  # a moment later
                        matches.append(Match(artifact_id, 0))
                        continue
                    self._catalog.drop(artifact_id)
                    if on_lost is not None:
                        on_lost(artifact_id, error)
            if len(matches) == len(candidates):  # else a bad one was dropped, and may have hidden a good one
                break
        found = [match for match in matches if match.tokens > 0]
        return max(found, key=lambda match: match.rank, default=None)

    def find_of_other_models(
        self, fingerprint: str, namespaces: Sequence[str], token_ids: TokenIds
    ) -> Match | None:
        """See `ArtifactStore.lookup_other_models`."""
        prompt, matches = token_bytes(token_ids), list[Match]()
        names = [check_namespace(name) for name in namespaces]
        found = self._catalog.prefixes.candidates_of_other_models(fingerprint, names, prompt)
        if found is None:
            return None
        owner, candidates = found
        for artifact_id in candidates:
            with suppress(ArtifactNotFound, CorruptArtifact):
                matches.append(self._match(artifact_id, owner, prompt, whole=False))
        best = max(matches, key=lambda match: match.rank, default=None)
        return best if best is not None and best.tokens > 0 else None

    def _match(self, artifact_id: str, owner: tuple[str, str], prompt: bytes, *, whole: bool) -> Match:
        """How far a candidate really agrees with the prompt. Raises ArtifactNotFound, CorruptArtifact."""
        try:
            item, manifest = self._tokens_of(artifact_id)
        except UnsupportedFormat:
            return Match(artifact_id, 0)
        if item.owner != owner or (whole and not prompt.startswith(item.tokens)):
            return Match(artifact_id, 0)
        return Match(artifact_id, common_tokens(item.tokens, prompt), item.fidelity, item.size, manifest)

    def _tokens_of(self, artifact_id: str) -> tuple[OwnedTokens, PrefixManifest | None]:
        """What is kept of an artifact, or has to be read, with its manifest then."""
        item = self._tokens.get(artifact_id)
        if item is not None:
            return item, None
        size = 0
        with suppress(ArtifactNotFound):  # reading says why
            size = self._blobs.size(artifact_id)
        manifest, tokens = self._checked.read_tokens(artifact_id)
        owner = (manifest.model.fingerprint, manifest.namespace)
        item = OwnedTokens(owner, tokens, manifest.fidelity.top1_agreement, size)
        self._tokens.put(artifact_id, item)
        return item, manifest
