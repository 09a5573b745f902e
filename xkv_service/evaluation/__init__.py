"""What a cache's content is worth: questions asked over exact, rebuilt, evicted or merged caches."""

from xkv_service.evaluation.chat import Chat, Reply, accuracy, ask_each, ask_in_turn

__all__ = ["Chat", "Reply", "accuracy", "ask_each", "ask_in_turn"]
