"""`PrefixFinder`: the longest stored prefix of a prompt, or why there is none. Never late, never an error."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from xkv_artifacts.damage_board import Note
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    MissingBlob,
    StoreError,
    UnsupportedFormat,
    XKVError,
)
from xkv_artifacts.format import TOKENS
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_artifacts.prefix_index import common_tokens
from xkv_artifacts.prefix_lookup import OnLost
from xkv_artifacts.reports import Match
from xkv_artifacts.store import ArtifactStore
from xkv_service.api import misses
from xkv_service.api.artifact_facts import ArtifactFacts
from xkv_service.api.damage_notes import DamageNotes
from xkv_service.api.errors import APIError
from xkv_service.api.remaker import Remaker
from xkv_service.api.settings import APISettings
from xkv_service.engine.breaker import Breaker
from xkv_service.engine.messages import Miss, PrefixMatch

Found = tuple[PrefixMatch | None, Miss | None]
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_THREADS = 8
_EXPLAIN_S = 0.25
"""How long a prompt waits to hear that another model has its prefix: it is computed either way (a guess)."""
_MOST_FACTS = 65_536
_AWAY = (CatalogUnavailable, CatalogError, StoreError, OSError)
_BROKEN = (ArtifactNotFound, CorruptArtifact, UnsupportedFormat)


class PrefixFinder:
    """Looks prompts up in the store, in threads of its own.

    Args:
        store: best opened with `patience_s=0`: a prompt that cannot be looked up is computed, not waited for.
        model: the served one. settings: what may be used.
        remaker: asked to make again what is found damaged or missing; None: nobody is.
    """

    def __init__(
        self,
        store: ArtifactStore,
        model: ModelIdentity,
        settings: APISettings,
        remaker: Remaker | None = None,
    ) -> None:
        self._store, self._model, self._settings = store, model, settings
        self._remaker = remaker
        self._threads = ThreadPoolExecutor(_THREADS, "xkv-lookup")
        self._explainer, self._explaining = ThreadPoolExecutor(1, "xkv-explain"), False
        self._breaker = Breaker(settings.lookup_pause_s)
        self._facts: OrderedDict[str, ArtifactFacts] = OrderedDict()
        self._notes = DamageNotes(store)

    @property
    def counters(self) -> dict[str, float]:
        """Those of its `Remaker`."""
        return {} if self._remaker is None else self._remaker.counters

    def close(self) -> None:
        """Let the threads end."""
        for threads in (self._threads, self._explainer):
            threads.shutdown(wait=False, cancel_futures=True)

    async def find(self, prompt: Sequence[int], namespace: str) -> Found:
        """The stored prefix of a prompt, in a namespace or the public one, and why it is none or no longer.

        Returns:
            A match that leaves at least one token to compute, or None; a miss, or None where the whole
            artifact is used.
        """
        ids = array("i", prompt)
        found = await self._asked(lambda: self._find(ids, namespace))
        if found is None:
            return None, misses.UNAVAILABLE
        usable, miss = found
        if usable is None and miss is not None and miss.reason == "no_artifact":
            miss = await self._explained(ids, namespace) or miss
        return usable, miss

    async def named(self, prefix_id: str, prompt: Sequence[int], namespace: str) -> Found:
        """As `find`, but the prefix of that id, if the prompt begins with it.

        Raises:
            APIError: 400, it does not.
        """
        ids = array("i", prompt)
        return await self._asked(lambda: self._named(prefix_id, ids, namespace)) or (None, misses.UNAVAILABLE)

    async def _asked(self, ask: Callable[[], Result]) -> Result | None:
        """What the store answers; None when it does not, or has not lately."""
        if not self._breaker.allows():
            return None
        asked = self._threads.submit(ask)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(asked), self._settings.lookup_timeout_s)
        except (asyncio.TimeoutError, *_AWAY) as error:
            self._breaker.failed()
            asked.add_done_callback(self._answered_late)
            why = str(error) or type(error).__name__
            _log.warning("prefixes are not looked up for %g s: %s", self._settings.lookup_pause_s, why)
            return None
        except Exception:  # not where nobody waits any more: then it is not known whether it answers
            self._breaker.succeeded()
            raise
        self._breaker.succeeded()
        return answer

    async def _explained(self, prompt: array[int], namespace: str) -> Miss | None:
        """What another model has of a prompt, if that is found out soon, one prompt at a time.

        It helps nobody's answer: what fails here, or hangs, must not keep prefixes from being looked up.
        """
        if self._explaining:
            return None
        self._explaining = True
        asked = self._explainer.submit(lambda: self._of_another_model(prompt, namespace))
        asked.add_done_callback(self._explained_one)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(asked)), _EXPLAIN_S)
        except (asyncio.TimeoutError, *_AWAY, *_BROKEN):
            return None

    def _explained_one(self, _: Future[Any]) -> None:
        self._explaining = False

    def _answered_late(self, asked: Future[Any]) -> None:
        """After `failed`; at once, of one that was not late but failed."""
        if not asked.cancelled() and not isinstance(asked.exception(), _AWAY):
            self._breaker.answered_late()

    def _find(self, prompt: array[int], namespace: str) -> Found:
        lost: dict[str, Miss] = {}

        def note(name: str, error: XKVError) -> None:
            lost[name] = misses.lost(name, error)
            self._notes.look_again()  # who asks next may hold all of it

        usable, miss = self._best(prompt, namespace, note)
        for name, one in lost.items():
            if one.reason != "evicted":
                self._tell_lost(name, prompt, one)
        lost |= self._take_noted(prompt, namespace)
        # Whatever else is found, this might have gone further.
        return usable, next(iter(lost.values()), miss)

    def _take_noted(self, prompt: array[int], namespace: str) -> dict[str, Miss]:
        """Have what was found lost without a prompt made again, where this prompt holds all of it."""
        if self._remaker is None:
            return {}
        allowed, found = self._readable(namespace), dict[str, Miss]()
        for name, note in self._notes.all().items():
            origin = self._origin(name, note)
            if origin is None or origin.namespace not in allowed or origin.tokens > len(prompt):
                continue
            if self._remaker.begins(name, origin, prompt) and self._notes.take(name):
                found[name] = misses.missing(name) if note.missing else misses.damaged(name)
                fault = f"{found[name].detail}, found without a prompt"
                self._remaker.ask(name, origin, prompt, fault, missing=note.missing)
        return found

    def _tell_lost(self, artifact_id: str, prompt: array[int], miss: Miss) -> None:
        if self._remaker is not None:
            origin = self._origin(artifact_id, self._notes.get(artifact_id))
            fault = f"{miss.detail}, found by a lookup"
            self._remaker.ask(artifact_id, origin, prompt, fault, missing=miss.reason == "missing")

    def _origin(self, artifact_id: str, note: Note) -> Origin | None:
        """What a lost artifact was made from: as it was read before, or as it is noted."""
        facts = self._facts.get(artifact_id)
        return note.origin if facts is None else facts.origin

    def _best(self, prompt: array[int], namespace: str, on_lost: OnLost) -> Found:
        found = self._longest(prompt, namespace, on_lost)
        if not found:
            return None, misses.NO_ARTIFACT
        miss: Miss | None = None
        for match in found:
            usable, miss = self._usable(match, prompt)
            if usable is not None:
                return usable, miss
        # Where prefixes serve whole or not at all, the longest may hide a shorter one that fits.
        shared = prompt[: min(found[0].tokens, len(prompt) - 1)]
        if miss is not None and miss.reason == "diverges":
            for match in self._longest(shared, namespace, on_lost, whole=True):
                usable, _ = self._usable(match, prompt)
                if usable is not None:
                    return usable, miss
        return None, miss

    def _longest(
        self, prompt: array[int], namespace: str, on_lost: OnLost, *, whole: bool = False
    ) -> list[Match]:
        """The longest match of each namespace that may be used, the best first."""
        matches = [
            self._store.lookup(self._model.fingerprint, owner, prompt, whole=whole, on_lost=on_lost)
            for owner in self._readable(namespace)
        ]
        found = [match for match in matches if match is not None]
        return sorted(found, key=lambda match: match.rank, reverse=True)

    def _of_another_model(self, prompt: array[int], namespace: str) -> Miss | None:
        """Where this very prompt would be served if another model had not made what is stored.

        Raises:
            Whatever reading an artifact does.
        """
        readable = self._readable(namespace)
        match = self._store.lookup_other_models(self._model.fingerprint, readable, prompt)
        if match is None:
            return None
        facts = self._read_facts(match.artifact_id, match.manifest)
        if facts.other_model is None or self._usable(match, prompt)[0] is None:
            return None
        return misses.other_model(
            f"artifact {match.artifact_id[:12]} shares {match.tokens} of its {facts.origin.tokens} tokens "
            "with the prompt, but",
            facts.other_model,
        )

    def _readable(self, namespace: str) -> list[str]:
        """A namespace and the public one."""
        return list(dict.fromkeys((namespace, self._settings.public_namespace)))

    def _usable(self, match: Match, prompt: array[int]) -> Found:
        """How much of a match can serve, and why not all of it."""
        name, least = match.artifact_id[:12], self._settings.min_match_tokens
        facts = self._facts_of(match.artifact_id, prompt, match.manifest)
        if isinstance(facts, Miss):
            return None, facts
        tokens = min(match.tokens, len(prompt) - 1)
        if tokens < least:
            detail = (
                f"artifact {name} and the prompt share {match.tokens} tokens, fewer than the {least} that pay"
            )
            return None, Miss("no_artifact", detail)
        if facts.fidelity < self._settings.min_fidelity:
            detail = f"artifact {name} agrees to {facts.fidelity:.3f} with the exact cache, "
            return None, Miss("low_fidelity", detail + f"and {self._settings.min_fidelity:g} are asked for")
        whole = facts.origin.tokens
        usable = PrefixMatch(match.artifact_id, tokens, facts.origin if match.tokens == whole else None)
        if tokens == whole:
            return replace(usable, parts=facts.parts), None  # they were measured behind its last tokens
        detail = f"artifact {name} and the prompt share {match.tokens} of its {whole} tokens"
        if facts.whole_only:
            return None, Miss("diverges", f"{detail}, and its model can use it whole only")
        prompt_ends = match.tokens == len(prompt)
        return usable, None if prompt_ends else Miss("diverges", detail)

    def _named(self, prefix_id: str, prompt: array[int], namespace: str) -> Found:
        name = prefix_id[:12]
        facts = self._facts_of_own(prefix_id, namespace, prompt)
        if isinstance(facts, Miss):
            return None, self._take_noted(prompt, namespace).get(prefix_id, facts)
        if facts.other_model is not None:
            return None, misses.other_model(f"prefix {name}", facts.other_model)
        try:
            stored = self._store.load(prefix_id, (TOKENS,))[1][TOKENS]
        except _BROKEN as error:
            return None, self._broken(error, prefix_id, prompt)
        tokens = common_tokens(token_bytes(stored), token_bytes(prompt))
        if tokens < (whole := facts.origin.tokens):
            message = (
                f"the prompt and prefix {name} share {tokens} of its {whole} tokens "
                "(send the prefix's own text first, or leave prefix_id out)"
            )
            raise APIError(400, message, param="prefix_id", code="prefix_mismatch")
        return self._usable(Match(prefix_id, tokens), prompt)

    def _facts_of_own(self, prefix_id: str, namespace: str, prompt: array[int]) -> ArtifactFacts | Miss:
        """Facts of an artifact that this namespace may use. Of others no more is asked than of none at all:
        neither the answer nor the time it takes tells them apart."""
        gone, allowed = misses.not_stored(prefix_id), self._readable(namespace)
        if not self._store.catalog.namespaces.holds(allowed, prefix_id):
            return gone
        facts = self._facts_of(prefix_id, prompt)
        return gone if isinstance(facts, ArtifactFacts) and facts.origin.namespace not in allowed else facts

    def _facts_of(
        self, artifact_id: str, prompt: array[int], manifest: PrefixManifest | None = None
    ) -> ArtifactFacts | Miss:
        try:
            return self._read_facts(artifact_id, manifest)
        except _BROKEN as error:
            return self._broken(error, artifact_id, prompt)

    def _read_facts(self, artifact_id: str, manifest: PrefixManifest | None) -> ArtifactFacts:
        facts = self._facts.get(artifact_id)
        if facts is None:
            if manifest is None:
                manifest = self._store.manifest(artifact_id)
            facts = ArtifactFacts.of(manifest, self._model, self._settings)
            self._facts[artifact_id] = facts
            if len(self._facts) > _MOST_FACTS:
                self._facts.popitem(last=False)
        return facts

    def _broken(self, error: XKVError, artifact_id: str, prompt: array[int]) -> Miss:
        miss = misses.lost(artifact_id, error)
        if isinstance(error, MissingBlob | CorruptArtifact):
            self._notes.look_again()
            self._tell_lost(artifact_id, prompt, miss)
        return miss
