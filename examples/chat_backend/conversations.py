"""`Conversations`: what was said so far, by id. In memory; a database would have the same methods."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

from examples.documents import Message

MOST = 1000


@dataclass
class Conversation:
    """One user's talk about one document.

    Args:
        messages: questions and answers in turn, without the document.
        turn: held while an answer is on its way; the next question waits for it.
    """

    id: str
    document: str
    messages: list[Message] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Conversations:
    """The newest `most` of them: the one that was quiet longest is forgotten first."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._all: OrderedDict[str, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    def begin(self, document: str) -> Conversation:
        """A new one. Its id cannot be guessed: whoever knows it may read on."""
        conversation = Conversation(secrets.token_urlsafe(16), document)
        self._all[conversation.id] = conversation
        if len(self._all) > self._most:
            quiet = (name for name, one in self._all.items() if not one.turn.locked())
            del self._all[next(quiet)]
        return conversation

    def get(self, name: str) -> Conversation:
        """The one of that id. Raises KeyError."""
        self._all.move_to_end(name)
        return self._all[name]

    def end(self, name: str) -> None:
        """Forget it. Raises KeyError."""
        del self._all[name]
