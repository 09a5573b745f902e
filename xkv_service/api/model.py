"""`ServedModel`: what the HTTP side knows of the model: its name, tokenizer and window, but no weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xkv_artifacts.manifest import ModelIdentity
from xkv_service.modeling.model_files import ModelFiles, context_window

if TYPE_CHECKING:
    from xkv_service.modeling.models import LoadedModel


@dataclass(frozen=True)
class ServedModel:
    """The model behind the API.

    Args:
        identity: who it is. tokenizer: its own.
        window: tokens of prompt and answer together, or None when the config does not say.
        vocabulary: token ids are below this.
        aliases: names that requests may use instead of its own.
    """

    identity: ModelIdentity
    tokenizer: Any
    window: int | None
    vocabulary: int
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, model: LoadedModel | ModelFiles, aliases: tuple[str, ...] = ()) -> ServedModel:
        """From a loaded model, or from the files of one that runs elsewhere."""
        config = model.config if isinstance(model, ModelFiles) else model.model.config
        vocabulary = int(config.get_text_config(decoder=True).vocab_size)
        return cls(model.identity, model.tokenizer, context_window(config), vocabulary, aliases)

    @property
    def name(self) -> str:
        """Its own name."""
        return self.identity.name

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use."""
        return (self.name, *self.aliases)

    def text_of(self, token: int) -> str:
        """One token as text, special tokens too."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))
