"""`xkv doctor`: does everything that precompute needs work here?"""

from __future__ import annotations

import click

from xkv_cli.options import json_option, store_options


@click.command()
@click.option(
    "--model",
    metavar="NAME_OR_PATH",
    envvar="XKV_MODEL",
    help="Model to try. Default: XKV_MODEL, else the bundled one.",
)
@store_options
@json_option
def doctor(model: str | None, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Check this machine: versions, device, Redis, store, free space, model. Each fault comes with a fix.

    \b
    Examples:
      xkv doctor
      xkv doctor --model ./llama --store s3://bucket/kv --redis redis://host:6379/0

    \b
    With --json, one object:
      {"ok", "checks": [{"name", "status": "ok"|"warning"|"failed", "detail", "fix"}]}

    Exit status: 0 nothing failed (warnings may be there), 1 something failed.
    """
    from xkv_cli import render
    from xkv_workers.doctor import examine

    checks = examine(store_url, redis_url, model)
    ok = all(check.status != "failed" for check in checks)
    if as_json:
        render.as_json({"ok": ok, "checks": [check.as_dict() for check in checks]})
    else:
        render.checks(checks)
    return 0 if ok else 1
