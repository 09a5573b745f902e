"""`PromptRenderer`: from messages, texts and token ids to the tokens of a prompt or of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv_service.api.errors import APIError
from xkv_service.api.model import ServedModel
from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompts import Messages, common_beginning, render_prefix
from xkv_service.sessions.rendering import ChatRenderer

# What may follow a conversation: the tokens that all of it begins with are those of the conversation alone.
_QUESTIONS = ("What?", "1", " x", "\n", "!", "漢")
_ANSWERS = ("It is so.", " x", "1", "漢")


@dataclass(frozen=True)
class PromptRenderer:
    """Renders for one model, with its own tokenizer and chat template. Takes a while for long texts."""

    model: ServedModel

    def chat(self, messages: Messages) -> tuple[int, ...]:
        """The tokens up to where the next answer begins.

        Raises:
            APIError: messages that the template does not take, or with a special token in them.
        """
        try:
            return tuple(ChatRenderer(self.model.tokenizer).prompt_ids(messages))
        except InvalidPrompt as error:
            raise APIError(400, error.message, param="messages", code="invalid_prompt") from None

    def completion(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a text as the tokenizer encodes it, or token ids as they are.

        Raises:
            APIError: no token at all, a special token in a text, or an id that the model does not have.
        """
        if isinstance(prompt, str):
            raw = ChatRenderer(self.model.tokenizer, template="raw")
            try:
                ids = raw.prompt_ids([{"role": "system", "content": prompt}])
            except InvalidPrompt as error:
                raise APIError(400, error.message, param="prompt", code="invalid_prompt") from None
        else:
            ids = list(prompt)
        if not ids:
            raise APIError(400, "the prompt is empty", param="prompt")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.model.vocabulary:
                message = f"token id {token} is not one of the model's {self.model.vocabulary:,}"
                raise APIError(400, message, param="prompt")
        return tuple(ids)

    def document(self, text: str, system_prompt: str | None) -> list[int]:
        """What every chat about a document starts with. Raises InvalidPrompt."""
        return render_prefix(self.model.tokenizer, text, system_prompt=system_prompt)

    def text(self, text: str) -> list[int]:
        """What every completion of a text starts with. Raises InvalidPrompt."""
        return render_prefix(self.model.tokenizer, text, template="raw")

    def conversation(self, messages: Messages) -> list[int]:
        """What every chat that goes on from these messages starts with.

        Raises:
            InvalidPrompt: messages that the template does not take, or nothing stays the same.
        """
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
