"""`TailSearch`: from a prompt to a stored tail that saves some of it, in two steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from xkv_artifacts.errors import ForeignTail
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.tail_entry import TailMatch
from xkv_artifacts.tail_shelf import TailShelf
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.kept_tails import KeptTail, usable_tokens
from xkv_service.engine.messages import GenerationRequest
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.tail_files import restored
from xkv_service.engine.tail_rates import TailRates
from xkv_service.modeling.models import LoadedModel


class NoTail(Exception):
    """Why no stored tail is used: "none" helps, "slow_load", "no_prefix" or "diverges"."""


@dataclass(frozen=True, eq=False)
class WantedTail:
    """A prompt whose tail is looked for.

    Args:
        request: whose prompt.
        held: tokens of it that are held already. prefix: those of them that are in factors.
        can_crop: whether tails of the model can go back.
        began: when it was asked for, on `time.monotonic`.
    """

    request: GenerationRequest = field(repr=False)
    held: int
    prefix: int
    can_crop: bool
    began: float = field(default_factory=time.monotonic)

    def saves(self, match: TailMatch) -> int:
        """Tokens that would not have to be computed with a match, as far as the catalog says."""
        usable = min(match.shared, len(self.request.token_ids) - 1)
        return usable - self.held if self.can_crop or usable == match.entry.tokens else 0


class TailSearch:
    """Looks for tails of one model.

    Args:
        loaded: the model. shelf: where tails are stored. pool: holds the prefixes behind them.
        settings: of the engine. rates: what loading and computing cost.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shelf: TailShelf,
        pool: PrefixPool,
        settings: EngineSettings,
        rates: TailRates,
    ) -> None:
        self._loaded, self._shelf, self._pool = loaded, shelf, pool
        self._settings, self._rates = settings, rates

    def find(self, wanted: WantedTail) -> tuple[TailMatch, float]:
        """The stored tail that saves most, and when to stop waiting for it, on `time.monotonic`.

        Raises:
            NoTail: none helps, those that do stand behind prefixes that are not in memory, or may not be
                used, or computing what the best one saves is faster.
            CatalogUnavailable, CatalogError
        """
        request = wanted.request
        matches = self._shelf.find(
            self._loaded.identity.fingerprint, request.namespace, token_bytes(request.token_ids)
        )
        helpful = [match for match in matches if wanted.saves(match) > 0]
        resident = {None, *self._pool.state().prefixes}
        usable = [
            match
            for match in helpful
            if match.entry.artifact in resident
            and request.may_use(match.entry.artifact, match.entry.prefix_tokens)
            and (not wanted.prefix or not _stays_with_artifact(request, match))
        ]
        if not usable:
            raise NoTail("no_prefix" if helpful else "none")
        match = max(usable, key=wanted.saves)
        seconds = self._rates.compute_s(wanted.saves(match), wanted.held, wanted.prefix)
        until = wanted.began + seconds
        if time.monotonic() + self._rates.load_s(match.entry.bytes) > until:
            raise NoTail("slow_load")
        return match, until

    def load(self, wanted: WantedTail, match: TailMatch) -> KeptTail:
        """Read a match, and hold the prefix behind it once for the caller.

        Raises:
            NoTail: its prefix is not in memory, or it saves nothing after all.
            ArtifactNotFound, ForeignTail, CorruptArtifact, UnsupportedFormat, StoreError, CatalogError
        """
        artifact_id = match.entry.artifact
        if artifact_id is None:
            return self._loaded_tail(wanted, match, None)
        prefix = self._pool.take(artifact_id, match.entry.prefix_tokens)
        if prefix is None:
            raise NoTail("no_prefix")
        try:
            return self._loaded_tail(wanted, match, prefix)
        except BaseException:
            self._pool.release(artifact_id)
            raise

    def _loaded_tail(self, wanted: WantedTail, match: TailMatch, prefix: Prefix | None) -> KeptTail:
        fingerprint, most = self._loaded.identity.fingerprint, self._settings.tail_bytes
        namespace = wanted.request.namespace
        manifest, tensors = self._shelf.load(match.id, fingerprint, namespace, most)
        if manifest.artifact != match.entry.artifact:
            raise ForeignTail(f"stored tail {match.id[:12]} stands behind another artifact than is listed")
        context = restored(self._loaded, manifest, tensors, prefix, self._settings.selection)
        usable = usable_tokens(context, token_bytes(wanted.request.token_ids))
        if usable <= wanted.held:
            raise NoTail("diverges")
        context.rewind(usable)
        return KeptTail(context, manifest.artifact, namespace, (), 0)


def _stays_with_artifact(request: GenerationRequest, match: TailMatch) -> bool:
    entry = match.entry
    return entry.artifact is None and request.goes_from_artifact(match.shared, entry.tokens)
