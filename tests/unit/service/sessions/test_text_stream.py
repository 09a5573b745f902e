"""Text told piece by piece is the text of all tokens, and nothing of a stop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_service.demo import demo_model_path
from xkv_service.modeling.models import load_tokenizer
from xkv_service.sessions.text_stream import TextStream

BUNDLED = load_tokenizer(demo_model_path())


def _bytes(ids: list[int]) -> str:
    """A tokenizer of single bytes."""
    return bytes(ids).decode("utf-8", "replace")


def _bundled(ids: list[int]) -> str:
    return str(BUNDLED.decode(ids, clean_up_tokenization_spaces=False))


def _spaced(ids: list[int]) -> str:
    """As SentencePiece decodes: a word's leading space is left out at the start."""
    return "".join(f" w{number}" if number % 3 else f"x{number}" for number in ids).removeprefix(" ")


def _told(stream: TextStream, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aé漢🙂\u0301 \n\ufffd"), max_size=12))
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    pieces = _told(TextStream(_bytes), list(text.encode()))
    assert "".join(pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_are_told_as_they_are(ids: list[int]) -> None:
    assert "".join(_told(TextStream(_bytes), ids)) == _bytes(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(6, len(BUNDLED) - 1), max_size=12))
def test_any_tokens_of_the_bundled_tokenizer(ids: list[int]) -> None:
    assert "".join(_told(TextStream(_bundled), ids)) == _bundled(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12))
def test_a_tokenizer_that_writes_the_first_word_differently(ids: list[int]) -> None:
    assert "".join(_told(TextStream(_spaced), ids)) == _spaced(ids)


@settings(max_examples=300, deadline=None)
@given(st.text("ab.é", max_size=14), st.lists(st.text("ab.", min_size=1, max_size=3), min_size=1, max_size=2))
def test_the_first_stop_ends_the_text(text: str, stops: list[str]) -> None:
    stream = TextStream(_bytes, stops)
    told = "".join(_told(stream, list(text.encode())))
    found = [text.index(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(found) and told == stream.text
    assert told == (text[: min(found)] if found else text) or _ends_earlier(text, stops, told)


def _ends_earlier(text: str, stops: list[str], told: str) -> bool:
    """Of two stops the one that is complete first ends the text, though the other may begin before it."""
    return any(text.startswith(told + stop) for stop in stops)


def test_text_is_held_back_no_longer_than_a_stop_may_begin_with_it() -> None:
    stream = TextStream(_bytes, ["END"])
    assert [stream.push(byte) for byte in b"aEbENc"] == ["a", "", "Eb", "", "", "ENc"]


@pytest.mark.parametrize("text", [" a", "\n\n a", "a "])
def test_leading_white_space_can_be_left_out(text: str) -> None:
    stream = TextStream(_bytes, ["\n\n"], strip=True)
    assert "".join(_told(stream, list(text.encode()))) == text.lstrip()


def test_a_real_chat_tokenizer_needs_no_more_context(tokenizer: Any) -> None:
    ids = tokenizer("naïve 漢字 🙂 text").input_ids
    stream = TextStream(lambda part: str(tokenizer.decode(part)))
    assert "".join(_told(stream, ids)) == "naïve 漢字 🙂 text"
