"""Which prompts a model can run at all."""

from __future__ import annotations

from xkv_service.engine.messages import Failed, GenerationRequest
from xkv_service.modeling.models import LoadedModel


def room(loaded: LoadedModel, request: GenerationRequest) -> int:
    """Tokens that the context window leaves behind a prompt."""
    window = loaded.context_window
    return 2**62 if window is None else window - len(request.token_ids)


def refusal(loaded: LoadedModel, request: GenerationRequest) -> Failed | None:
    """Why the model cannot run a prompt, or None."""
    if not request.token_ids:
        return Failed("invalid", "the prompt is empty", hint="give at least one token")
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocabulary:
        return Failed("invalid", f"the prompt has token ids outside of 0 to {vocabulary - 1}")
    if room(loaded, request) < 1:
        window = loaded.context_window
        return Failed(
            "invalid",
            f"the prompt has {len(request.token_ids)} tokens, and the model's context window {window}",
            hint="shorten it",
        )
    return None
