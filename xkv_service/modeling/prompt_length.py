"""Whether a text has many more tokens than fit, told from its beginning: all of it takes seconds."""

from __future__ import annotations

from typing import Any

CHARACTERS = 8
"""For each token that fits: a shorter text is tokenized whole anyway. Prose has 3 to 5 characters a token."""
_MARGIN = 16
"""One more token of so many: where a text is cut, its last few tokens are not those of the whole."""


def much_longer(tokenizer: Any, text: str, most: int) -> bool:
    """Whether a text has more than `most` tokens for certain; False where it must be tokenized whole to know.

    Twice as much is looked at each time, so all looks together cost no more than two of the last one.
    """
    certain = most + most // _MARGIN
    size = CHARACTERS * most
    while size < len(text):
        if len(tokenizer(text[:size], add_special_tokens=False, verbose=False).input_ids) > certain:
            return True
        size *= 2
    return False
