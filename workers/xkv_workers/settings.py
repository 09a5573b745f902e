"""Defaults that come from the environment."""

from __future__ import annotations

import os
from pathlib import Path


def default_store() -> str:
    """`XKV_STORE`, else `xkv` in the user's data folder (`XDG_DATA_HOME`, else ~/.local/share)."""
    if store := os.environ.get("XKV_STORE"):
        return store
    data = os.environ.get("XDG_DATA_HOME")
    return str((Path(data) if data else Path.home() / ".local" / "share") / "xkv")
