"""The HTTP API: OpenAI's endpoints, prefixes, metrics and a status page, over any engine."""
