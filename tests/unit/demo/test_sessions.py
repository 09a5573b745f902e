"""Sessions on the bundled model: right answers from factors, however the conversation is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import Any

import pytest

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, make_document
from xkv_service.modeling.model_files import find_model
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.opening import open_session
from xkv_service.sessions.rendering import ChatRenderer
from xkv_service.sessions.saved import load_session, save_session
from xkv_service.sessions.session import Session

QUESTIONS = 3


@dataclass(frozen=True)
class Talk:
    """A document in a store, and the model that talks about it."""

    loaded: LoadedModel
    store: ArtifactStore
    document: Document
    artifact: str

    def session(self, **renderer: Any) -> Session:
        """A new session; by default with the document's text."""
        text = ChatRenderer(self.loaded.tokenizer, **{"document": self.document.text, **renderer})
        return open_session(self.loaded, self.store, self.artifact, renderer=text)


@pytest.fixture(scope="module")
def talk(demo_model: Any, demo_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    document = make_document(Random("sessions"), 900)
    identity = find_model(demo_model_path(), dtype="float32", device="cpu").identity
    ids = ChatRenderer(demo_tokenizer, document.text).prefix_ids()
    factors = compress(demo_model, ids, CompressionSpec(ratio=6))
    manifest = PrefixManifest(
        id=artifact_id(identity.fingerprint, "default", ids, factors.spec.canonical()),
        model=identity,
        namespace="default",
        document=DocumentRef(uri="document.txt", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **factors.manifest_fields(),
    )
    with ArtifactStore.open(str(tmp_path_factory.mktemp("talk") / "store")) as store:
        store.publish(manifest, factors.to_tensors())
        yield Talk(LoadedModel(demo_model, demo_tokenizer, identity), store, document, manifest.id)


def _asked(session: Session, talk: Talk, between: Callable[[Session], Session]) -> list[str]:
    answers = []
    for question in talk.document.questions[:QUESTIONS]:
        session = between(session)
        answers.append(session.send(question.question).text)
    return answers


def test_facts_come_back_however_the_conversation_is_cut(talk: Talk, tmp_path: Path) -> None:
    right = [question.answer for question in talk.document.questions[:QUESTIONS]]

    def saved(session: Session) -> Session:
        save_session(session, tmp_path / "talk")
        return load_session(tmp_path / "talk", talk.loaded, talk.store)

    def rebuilt(session: Session) -> Session:
        other = talk.session()
        other.messages = session.messages
        return other

    assert _asked(talk.session(), talk, lambda session: session) == right
    assert _asked(talk.session(), talk, saved) == right
    assert _asked(talk.session(), talk, rebuilt) == right
    assert _asked(talk.session(), talk, Session.fork) == right
    assert _asked(talk.session().exact(), talk, lambda session: session) == right


def test_nothing_is_computed_twice_in_an_ordinary_conversation(talk: Talk) -> None:
    session = talk.session()
    held = session.context.prefix_tokens
    for question in talk.document.questions[:QUESTIONS]:
        reply = session.send(question.question)
        assert (reply.cached_tokens, reply.dropped_tokens, reply.finish) == (held, 0, "stop")
        held = len(session.context.ids)


def test_the_document_comes_back_from_the_artifacts_tokens(talk: Talk) -> None:
    session = talk.session(document=None)
    assert session.renderer.document is not None
    lost = len(talk.document.text) - len(session.renderer.document)
    assert talk.document.text.startswith(session.renderer.document) and lost < 20
    question = talk.document.questions[0]
    assert session.send(question.question).text == question.answer
