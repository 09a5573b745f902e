"""Write docs/cli.md from the help texts of the `xkv` command; `--check` says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from xkv_cli.main import xkv

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_WIDTH = 100
_INTRODUCTION = """# The `xkv` command

Made by `python tools/cli_docs.py` from the help texts; a test fails when it is not up to date.
"""


def document() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for name, command in _commands(xkv, "xkv"):
        context = click.Context(command, info_name=name, terminal_width=_WIDTH, max_content_width=_WIDTH)
        parts.append(f"## {name}\n\n```text\n{_help(command, context)}\n```\n")
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context) -> str:
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from _commands(found, f"{name} {child}")


def main() -> int:
    """Write or check the page."""
    page = document()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.exists() and TARGET.read_text("utf-8") == page else 1
    TARGET.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
