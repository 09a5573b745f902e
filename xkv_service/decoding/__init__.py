"""Decode from factors: a Transformers cache, the attention that reads it, and conversations over it."""
