"""`Admission`: what is under way, of each key and in all, held to its limits."""

from __future__ import annotations

from collections import Counter

from xkv_service.api.errors import RETRY_S, APIError
from xkv_service.api.keys import Key


class Slot:
    """One request under way; `release` gives back its place and what it counts for, once."""

    def __init__(self, admission: Admission, key: Key, body_bytes: int) -> None:
        self._admission, self._key = admission, key
        self._body_bytes, self._tokens = body_bytes, 0
        self._held = True

    def note_body(self, nbytes: int) -> None:
        """The body was read, and has so many bytes."""
        self._admission.body_bytes[self._key.name] += nbytes - self._body_bytes
        self._body_bytes = nbytes

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
            self._admission.body_bytes[self._key.name] -= self._body_bytes


class Admission:
    """Counts requests, prompt tokens and bytes of bodies under way by key name. For one event loop.

    Args:
        most_requests: of all keys together. most_body_bytes: of their bodies.
        most_key_bytes: of the bodies of one key, which may have one larger one.
    """

    def __init__(self, most_requests: int, most_body_bytes: int, most_key_bytes: int) -> None:
        self._most_requests = most_requests
        self._most_body_bytes, self._most_key_bytes = most_body_bytes, most_key_bytes
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.body_bytes: Counter[str] = Counter()

    def enter(self, key: Key, body_bytes: int) -> Slot:
        """A place for one request.

        Args:
            body_bytes: the most that its body may have.

        Raises:
            APIError: 429, the key has none left; 503, the server has none left.
        """
        if self.requests[key.name] >= key.limits.requests:
            raise _full(f"{key.limits.requests} requests of this key are under way, as many as it may have")
        if self.requests.total() >= self._most_requests:
            raise _overloaded(
                f"{self._most_requests} requests are under way, as many as this server takes at once"
            )
        held = self.body_bytes.total()
        if held + body_bytes > self._most_body_bytes:
            taken = f"{held:,} of the {self._most_body_bytes:,} bytes"
            raise _overloaded(f"bodies of requests under way have {taken} that this server holds at once")
        mine, share = self.body_bytes[key.name], self._most_key_bytes
        if mine and mine + body_bytes > share:
            raise _full(
                f"bodies of this key's requests have {mine:,} of the {share:,} bytes that it may have at once"
            )
        self.requests[key.name] += 1
        self.body_bytes[key.name] += body_bytes
        return Slot(self, key, body_bytes)


def _full(message: str) -> APIError:
    return APIError(429, message, code="rate_limit_exceeded", retry_after_s=RETRY_S)


def _overloaded(message: str) -> APIError:
    return APIError(503, message, code="overloaded", retry_after_s=RETRY_S)
