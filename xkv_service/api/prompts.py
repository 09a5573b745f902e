"""`PromptRenderer`: from messages, texts and token ids to the tokens of a prompt or of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv_service.api.errors import APIError, shortened, told
from xkv_service.api.model import ServedModel
from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompt_length import CHARACTERS, much_longer
from xkv_service.modeling.prompts import (
    Messages,
    apply_template,
    common_beginning,
    refuse_special_tokens,
    render_prefix,
)
from xkv_service.sessions.rendering import ChatRenderer

# What may follow a conversation: the tokens that all of it begins with are those of the conversation alone.
_QUESTIONS = ("What?", "1", " x", "\n", "!", "漢")
_ANSWERS = ("It is so.", " x", "1", "漢")


@dataclass(frozen=True)
class PromptRenderer:
    """Renders for one model, with its own tokenizer and chat template. Takes a while for long texts; those
    that are much longer than the model's window are refused before they are tokenized whole.

    Every method but `check_length` raises the APIError of `check_length` for them.
    """

    model: ServedModel

    def check_length(self, tokens: int | None, param: str, *, prefix: bool = False) -> None:
        """Refuse what the window cannot hold.

        Args:
            tokens: of a prompt or a prefix; None: more than the window has. param: where it came from.

        Raises:
            APIError: 400, "context_length_exceeded".
        """
        window = self.model.window
        if window is None or (tokens is not None and tokens < window):
            return
        what, more = ("prefix", "a chat") if prefix else ("prompt", "an answer")
        told = f"more than {window:,}" if tokens is None else f"{tokens:,}"
        message = (
            f"the {what} has {told} tokens, and this model's window of {window:,} must hold {more} as well"
        )
        raise APIError(400, f"{message}: shorten it", param=param, code="context_length_exceeded")

    def chat(self, messages: Messages) -> tuple[int, ...]:
        """The tokens up to where the next answer begins.

        Raises:
            APIError: messages that the template does not take, or with a special token in them.
        """
        try:
            self._check_chat(messages, "messages")
            return tuple(ChatRenderer(self.model.tokenizer).prompt_ids(messages))
        except InvalidPrompt as error:
            raise APIError(400, told(error), param="messages", code="invalid_prompt") from None

    def completion(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a text as the tokenizer encodes it, or token ids as they are.

        Raises:
            APIError: no token at all, a special token in a text, or an id that the model does not have.
        """
        if isinstance(prompt, str):
            self._check_text(prompt, "prompt")
            raw = ChatRenderer(self.model.tokenizer, template="raw")
            try:
                refuse_special_tokens(self.model.tokenizer, prompt, "prompt")
                ids = raw.prompt_ids([{"role": "system", "content": prompt}])
            except InvalidPrompt as error:
                raise APIError(400, told(error), param="prompt", code="invalid_prompt") from None
        else:
            ids = list(prompt)
        if not ids:
            raise APIError(400, "the prompt is empty", param="prompt")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.model.vocabulary:
                last = self.model.vocabulary - 1
                message = f"token id {shortened(str(token))} is not one of the model's, 0 to {last}"
                raise APIError(400, message, param="prompt")
        return tuple(ids)

    def document(self, text: str, system_prompt: str | None) -> list[int]:
        """What every chat about a document starts with. Raises InvalidPrompt."""
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        refuse_special_tokens(self.model.tokenizer, system_prompt or "", "system prompt")
        self._check_chat([*messages, {"role": "user", "content": text}], "document", prefix=True)
        return render_prefix(self.model.tokenizer, text, system_prompt=system_prompt)

    def text(self, text: str) -> list[int]:
        """What every completion of a text starts with. Raises InvalidPrompt."""
        self._check_text(text, "text", prefix=True)
        if not text.strip():
            raise InvalidPrompt("the text is empty", hint="give one with words in it")
        refuse_special_tokens(self.model.tokenizer, text, "text")
        return render_prefix(self.model.tokenizer, text, template="raw")

    def conversation(self, messages: Messages) -> list[int]:
        """What every chat that goes on from these messages starts with.

        Raises:
            InvalidPrompt: messages that the template does not take, or nothing stays the same.
        """
        self._check_chat(messages, "messages", prefix=True)
        renderer = ChatRenderer(self.model.tokenizer)
        following = [{"role": "user", "content": question} for question in _QUESTIONS]
        if messages[-1]["role"] == "user":
            answers = [{"role": "assistant", "content": answer} for answer in _ANSWERS]
            more: list[Messages] = [[], *([answer, following[0]] for answer in answers)]
        else:
            more = [[question] for question in following]
        ids: list[int] = common_beginning([renderer.prompt_ids([*messages, *after]) for after in more])
        if not ids:
            raise InvalidPrompt("the chat template gives these messages no beginning that stays the same")
        return ids

    def _check_chat(self, messages: Messages, param: str, *, prefix: bool = False) -> None:
        window = self.model.window
        if window is not None and sum(len(one["content"]) for one in messages) > CHARACTERS * window:
            text = apply_template(self.model.tokenizer, messages, tokenize=False)
            self._check_text(text, param, prefix=prefix)

    def _check_text(self, text: str, param: str, *, prefix: bool = False) -> None:
        window = self.model.window
        if window is not None and much_longer(self.model.tokenizer, text, window):
            self.check_length(None, param, prefix=prefix)
