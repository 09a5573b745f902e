"""`BoundPrefix`: a resident prefix and the shorter ones made of it."""

from __future__ import annotations

from weakref import WeakValueDictionary

from xkv_service.decoding.prefix import Prefix


class BoundPrefix:
    """A whole prefix. Shorter ones are views of it, so they cost nothing; each is one object while in use, so
    that sequences behind it can be batched.
    """

    def __init__(self, whole: Prefix) -> None:
        self.whole = whole
        self._shorter: WeakValueDictionary[int, Prefix] = WeakValueDictionary()

    def first(self, tokens: int) -> Prefix:
        """The prefix of the first `tokens` tokens.

        Raises:
            InvalidSpec: there are not so many, or the prefix can only be used whole.
        """
        if tokens == self.whole.tokens:
            return self.whole
        found = self._shorter.get(tokens)
        if found is None:
            found = self._shorter[tokens] = self.whole.first(tokens)
        return found
