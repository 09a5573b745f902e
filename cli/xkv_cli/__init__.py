"""The `xkv` command: parses, calls, renders."""
