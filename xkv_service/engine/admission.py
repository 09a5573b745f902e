"""Which requests an engine cannot answer, whatever it holds, and how long an answer may be."""

from __future__ import annotations

from xkv_service.engine.messages import Failed, GenerationRequest
from xkv_service.modeling.models import LoadedModel


def refusal_of(request: GenerationRequest, loaded: LoadedModel) -> Failed | None:
    """Why the model cannot take a prompt, or None."""
    if not request.token_ids:
        return Failed("invalid", "the prompt is empty", hint="give at least one token")
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocabulary:
        return Failed("invalid", f"the prompt has token ids outside of 0 to {vocabulary - 1}")
    if room_for(request, loaded) < 1:
        window = loaded.context_window
        return Failed(
            "invalid",
            f"the prompt has {len(request.token_ids)} tokens, and the model's context window {window}",
            hint="shorten it",
        )
    return None


def room_for(request: GenerationRequest, loaded: LoadedModel) -> int:
    """Tokens that the context window leaves for an answer."""
    return 2**62 if loaded.context_window is None else loaded.context_window - len(request.token_ids)
