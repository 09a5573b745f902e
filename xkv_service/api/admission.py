"""`Admission`: what is under way, of each key and in all, held to its limits."""

from __future__ import annotations

from collections import Counter

from xkv_service.api.errors import RETRY_S, APIError
from xkv_service.api.keys import Key


class Slot:
    """One request under way; `release` gives back its place and its prompt's tokens, once."""

    def __init__(self, admission: Admission, key: Key) -> None:
        self._admission, self._key = admission, key
        self._tokens = 0
        self._held = True

    def add_prompt(self, tokens: int, param: str) -> None:
        """Count the prompt.

        Args:
            param: the parameter that it came from.

        Raises:
            APIError: 400 when the key may never send so many, 429 when not beside its other requests.
        """
        most, name = self._key.limits.prompt_tokens, self._key.name
        if tokens > most:
            message = f"the prompt has {tokens:,} tokens, and this key may send {most:,}"
            raise APIError(400, message, param=param, code="prompt_too_long")
        if self._admission.tokens[name] + tokens > most:
            raise _full(f"the requests under way have all the {most:,} prompt tokens that this key may send")
        self._admission.tokens[name] += tokens
        self._tokens += tokens

    def release(self) -> None:
        """The request is done."""
        if self._held:
            self._held = False
            self._admission.requests[self._key.name] -= 1
            self._admission.tokens[self._key.name] -= self._tokens


class Admission:
    """Counts requests and prompt tokens under way by key name. For one event loop.

    Args:
        most_requests: of all keys together.
    """

    def __init__(self, most_requests: int) -> None:
        self._most_requests = most_requests
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def enter(self, key: Key) -> Slot:
        """A place for one request.

        Raises:
            APIError: 429, the key has none left; 503, the server has none left.
        """
        if self.requests[key.name] >= key.limits.requests:
            raise _full(f"{key.limits.requests} requests of this key are under way, as many as it may have")
        if self.requests.total() >= self._most_requests:
            message = f"{self._most_requests} requests are under way, as many as this server takes at once"
            raise APIError(503, message, code="overloaded", retry_after_s=RETRY_S)
        self.requests[key.name] += 1
        return Slot(self, key)


def _full(message: str) -> APIError:
    return APIError(429, message, code="rate_limit_exceeded", retry_after_s=RETRY_S)
