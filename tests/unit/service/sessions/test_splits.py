"""However a conversation is cut into calls, sessions and files, greedy answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talking import Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.sessions.saved import load_session, save_session
from xkv_service.sessions.session import Session
from xkv_service.sessions.settings import GenerationSettings

SHORT = GenerationSettings(max_new_tokens=6)
# What happens to a session between two questions.
CUTS = ("nothing", "rebuilt from its messages", "saved and loaded", "forked", "broken off", "asked otherwise")


def _cut(session: Session, how: str, talker: Talker, store: ArtifactStore, path: Path) -> Session:
    if how == "rebuilt from its messages":
        return talker.session(messages=session.messages, source=session.source)
    if how == "saved and loaded":
        save_session(session, path)
        return load_session(path, talker.loaded, store)
    if how == "forked":
        return session.fork()
    if how in ("broken off", "asked otherwise"):  # and then taken back
        before = list(session.messages)
        stream = session.stream("Something else?", replace(SHORT, max_new_tokens=9))
        for _ in range(2 if how == "broken off" else 99):
            next(stream, None)
        stream.close()  # type: ignore[attr-defined]
        session.messages = before
    return session


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    turns=st.lists(st.tuples(st.text("why 3é?", max_size=9), st.sampled_from(CUTS)), min_size=1, max_size=4)
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
def test_any_split_gives_the_same_answers(
    talkers: Callable[[str], Talker],
    store: ArtifactStore,
    tmp_path: Path,
    family: str,
    turns: list[tuple[str, str]],
) -> None:
    talker = talkers(family)
    plain = talker.published(store)
    cut = plain.fork()
    for question, how in turns:
        cut = _cut(cut, how, talker, store, tmp_path / "talk")
        assert cut.send(question, SHORT).text == plain.send(question, SHORT).text, how
    assert cut.messages == plain.messages
