"""The loop of `xkv chat`: reads lines, answers them, follows its commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from xkv_artifacts.errors import XKVError
from xkv_cli.conversation_options import tell
from xkv_cli.conversation_render import printable, statistics
from xkv_cli.render import complain
from xkv_service.sessions.reply import Reply
from xkv_service.sessions.saved import save_session
from xkv_service.sessions.session import Session
from xkv_service.sessions.settings import GenerationSettings
from xkv_workers.conversation import Conversation

_HELP = """/exact        answer the last question again, from the exact cache
/stats        tokens, bytes and speed
/save [FILE]  save the conversation
/reset        forget the conversation, keep the document
/quit         leave (or Ctrl-D)
Ctrl-C stops an answer."""


class ChatLoop:
    """A conversation with whoever is at stdin.

    Args:
        settings: how answers are decoded. path: where the conversation is saved at the end, or None.
    """

    def __init__(
        self, conversation: Conversation, settings: GenerationSettings, path: Path | None = None
    ) -> None:
        self._conversation, self._settings, self._path = conversation, settings, path
        self._session = conversation.session
        self._exact: Session | None = None
        self._person = sys.stdin.isatty()
        self._failed = False

    def run(self) -> int:
        """Until there is nothing more to read; the exit status."""
        if self._person:
            self._greet()
        for line in self._lines():
            if line in ("/quit", "/exit"):
                break
            try:
                self._follow(line) if line.startswith("/") else self._answer(self._session, line)
            except XKVError as error:
                complain(error.message, error.hint)
                self._failed = True
            except KeyboardInterrupt:
                if not self._person:
                    raise
                click.echo()
                tell("stopped")
        if self._path is not None and self._session.messages:
            self._save(self._path)
        return 1 if self._failed and not self._person else 0

    def _greet(self) -> None:
        tokens = self._session.context.prefix_tokens
        turns = len(self._session.messages) // 2
        said = f", {turns} questions answered before" if turns else ""
        tell(f"{tokens:,} tokens of prefix{said}; /help lists commands")

    def _lines(self) -> Iterator[str]:
        """What was typed, without empty lines."""
        if self._person:
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() its editing and history
        while True:
            try:
                line = input("> ") if self._person else sys.stdin.readline()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                if not self._person:
                    raise
                click.echo("\n(Ctrl-D or /quit leaves)")
                continue
            if not self._person and not line:
                return
            if line.strip():
                yield line.strip()

    def _answer(self, session: Session, question: str) -> None:
        """Stream an answer; the session keeps as much as came before Ctrl-C."""
        for piece in session.stream(question, self._settings):
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._say_what_was_dropped(session.last_reply)

    def _say_what_was_dropped(self, reply: Reply | None) -> None:
        if reply is not None and reply.dropped_tokens and self._person:
            tell(
                f"{reply.dropped_tokens:,} tokens held did not go on as the chat template renders the "
                f"conversation; {reply.prompt_tokens - reply.cached_tokens:,} were computed"
            )

    def _follow(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        actions = {"/stats": self._stats, "/reset": self._reset, "/exact": self._answer_exactly}
        if command in actions and not rest:
            actions[command]()
        elif command == "/help":
            click.echo(_HELP)
        elif command == "/save":
            self._save_as(rest.strip())
        else:
            complain(f"no command {printable(line)!r}", "/help lists them")
            self._failed = True

    def _stats(self) -> None:
        statistics(self._conversation, self._exact.last_reply if self._exact else None)

    def _reset(self) -> None:
        self._session.reset()
        tell("the conversation is forgotten")

    def _answer_exactly(self) -> None:
        messages = self._session.messages
        if not messages:
            complain("nothing was asked yet")
            return
        if self._exact is None:
            tell(f"prefilling {self._session.context.prefix_tokens:,} tokens into an exact cache")
            self._exact = self._session.exact()
        self._exact.messages = messages[:-2]
        self._answer(self._exact, messages[-2]["content"])

    def _save_as(self, name: str) -> None:
        if name:
            self._save(Path(name).expanduser())
        elif self._path is not None:
            self._save(self._path)
        else:
            complain("no file to save to", "/save FILE")

    def _save(self, path: Path) -> None:
        save_session(self._session, path)
        tell(f"saved to {path}: xkv chat --session {path} goes on")
