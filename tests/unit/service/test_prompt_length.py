"""A text is refused by its beginning only if the whole of it is too long, whatever is in it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from xkv_service.demo import demo_model_path
from xkv_service.modeling.model_files import find_model
from xkv_service.modeling.prompt_length import much_longer

MOST = 64
PARTS = (
    "word ",
    "a",
    " " * 20,
    "漢字",
    "🙂",
    "\n",
    "the river ends in the sea. ",
    "1234567890",
    "e\u0301",
    "\t",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return find_model(demo_model_path(), device="cpu").tokenizer


@pytest.mark.parametrize("seed", range(20))
def test_what_is_told_of_a_beginning_holds_for_the_whole(tokenizer: Any, seed: int) -> None:
    chosen = random.Random(seed)
    parts = chosen.choices(PARTS, k=2) if seed % 2 else PARTS
    text = "".join(chosen.choices(parts, k=chosen.randrange(20, 800)))
    tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
    if much_longer(tokenizer, text, MOST):
        assert tokens > MOST
    elif len(text) > 8 * MOST:
        assert tokens < len(text) / 4


def test_a_text_that_is_dense_at_its_beginning_alone_is_looked_at_further(tokenizer: Any) -> None:
    class Dense:
        """One token for each run of one character."""

        def __call__(self, text: str, **_: Any) -> Any:
            runs = [one for at, one in enumerate(text) if at == 0 or text[at - 1] != one]
            return type("Ids", (), {"input_ids": runs})

    assert not much_longer(Dense(), "a" * 100_000, MOST)
    assert much_longer(Dense(), "a" * 10_000 + "ab" * 10_000, MOST)
