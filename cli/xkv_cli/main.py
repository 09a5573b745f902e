"""The `xkv` command: its groups, and how errors reach a person. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import TracebackType
from typing import Any

import click

from xkv_artifacts.errors import XKVError
from xkv_cli.plain_text import escaped
from xkv_service.modeling.late_hqq import put_off_hqq

EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT

# Command -> module and attribute. A module is imported when its command is used.
_COMMANDS = {
    "precompute": ("xkv_cli.precompute", "precompute"),
    "chat": ("xkv_cli.chat", "chat"),
    "ask": ("xkv_cli.ask", "ask"),
    "serve": ("xkv_cli.serve", "serve"),
    "text": ("xkv_cli.text", "text"),
    "ls": ("xkv_cli.artifacts", "ls"),
    "show": ("xkv_cli.artifacts", "show"),
    "verify": ("xkv_cli.artifacts", "verify"),
    "rm": ("xkv_cli.artifacts", "rm"),
    "pin": ("xkv_cli.retention", "pin"),
    "unpin": ("xkv_cli.retention", "unpin"),
    "ttl": ("xkv_cli.retention", "ttl"),
    "calibrate": ("xkv_cli.calibrate", "calibrate"),
    "calibrations": ("xkv_cli.calibrations", "calibrations"),
    "index": ("xkv_cli.store", "index"),
    "gc": ("xkv_cli.store", "gc"),
    "pack": ("xkv_cli.store", "pack"),
    "analyze": ("xkv_cli.analyze", "analyze"),
    "eval": ("xkv_cli.evaluate", "evaluate"),
    "doctor": ("xkv_cli.doctor", "doctor"),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="xkv-service", prog_name="xkv")
def xkv() -> None:
    """Compress the KV cache of long documents once, and keep the factors for every later chat.

    \b
    Start here:
      xkv precompute --docs my-documents/     compress a folder with the bundled model
      xkv chat --doc handbook.md              talk about a document
      xkv serve                               answer OpenAI's API at http://127.0.0.1:8000
      xkv ls                                  what is in the store
      xkv verify                              re-read every byte of it
      xkv doctor                              check this machine

    Artifacts go to a store: ~/.local/share/xkv, or XKV_STORE, or --store. A Redis keeps the catalog: one
    that xkv starts beside the store, or XKV_REDIS_URL, or --redis.

    Every command but chat, serve and text takes --json, which prints exactly one JSON object on stdout.
    Exit status: 0 all is well, 1 something failed, 2 wrong usage, 130 interrupted. XKV_DEBUG=1 shows
    tracebacks.
    """


def main() -> None:
    """Entry point of the console script: run, and turn every error into one line and an exit status."""
    sys.excepthook = _last_resort
    put_off_hqq()
    try:
        status = xkv.main(standalone_mode=False, prog_name="xkv")
    except click.exceptions.Abort:
        status = _interrupted()
    except KeyboardInterrupt:
        status = _interrupted()
    except SystemError as error:  # compiled code makes one of an exception that it did not look for
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        status = _interrupted()
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except XKVError as error:
        if _debug():
            raise
        _complain(error.message, error.hint)
        status = EXIT_FAILED
    sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> int:
    click.echo("interrupted: run the same command again to go on where it stopped", err=True)
    return EXIT_INTERRUPTED


def _complain(message: str, hint: str = "") -> None:
    click.echo(f"error: {escaped(message)}", err=True)
    if hint:
        click.echo(f"hint: {escaped(hint)}", err=True)


def _last_resort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    """What Python calls for an error that nobody expected: a line that can be reported, exit status 1."""
    if _debug():
        sys.__excepthook__(kind, error, trace)
        return
    text = " ".join(str(error).split())[:300]
    _complain(f"unexpected {kind.__name__}: {text}", "XKV_DEBUG=1 shows where; please report it")


def _debug() -> bool:
    return os.environ.get("XKV_DEBUG", "") not in ("", "0")
