"""`xkv pin`, `unpin` and `ttl`: how long an artifact is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from xkv_cli.options import json_option, store_options
from xkv_cli.times import TimeType

if TYPE_CHECKING:
    from xkv_artifacts.retention import Retention
    from xkv_artifacts.store import ArtifactStore


@click.command()
@click.argument("artifact", metavar="ID")
@store_options
@json_option
def pin(artifact: str, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Keep an artifact, whatever its time to live and however full the store is.

    `xkv gc` and the background collector leave it alone until it is unpinned; `xkv rm` removes it all the
    same. The pin is kept in the store beside the artifact, so it outlives the catalog.

    \b
    Example:
      xkv pin 3fa9c1

    \b
    With --json, one object:
      {"id", "pinned", "expires"}
    """
    return _change(artifact, store_url, redis_url, as_json, lambda store, found: store.pin(found))


@click.command()
@click.argument("artifact", metavar="ID")
@store_options
@json_option
def unpin(artifact: str, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Let the collector have an artifact again.

    Where its time to live is over meanwhile, it is gone at once.

    \b
    Example:
      xkv unpin 3fa9c1

    \b
    With --json, one object:
      {"id", "pinned", "expires"}
    """
    return _change(artifact, store_url, redis_url, as_json, lambda store, found: store.unpin(found))


@click.command(context_settings={"ignore_unknown_options": True})  # so that -5s is a time, if no good one
@click.argument("artifact", metavar="ID")
@click.argument("time", metavar="TIME", type=TimeType(none=True))
@store_options
@json_option
def ttl(artifact: str, time: float | None, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Let an artifact end TIME from now: 90s, 15m, 12h, 7d, or none for never.

    It counts from now and not from the last use, as with the explicit context caches of model providers: it
    is a promise of when the content is gone. Give it again to prolong it. From its end on the artifact is not
    found any more; `xkv gc` or the background collector then deletes it. A pinned one does not end.

    \b
    Examples:
      xkv ttl 3fa9c1 7d
      xkv ttl 3fa9c1 none

    \b
    With --json, one object; "expires" in seconds since the epoch, or null:
      {"id", "pinned", "expires"}
    """
    return _change(artifact, store_url, redis_url, as_json, lambda store, found: store.set_ttl(found, time))


def _change(
    artifact: str,
    store_url: str,
    redis_url: str | None,
    as_json: bool,
    change: Callable[[ArtifactStore, str], Retention],
) -> int:
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import resolve

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        found = resolve(store, artifact)
        retention = change(store, found)
    if as_json:
        render.as_json({"id": found, "pinned": retention.pinned, "expires": retention.expires})
    else:
        click.echo(f"{found}: {render.retention(retention.pinned, retention.expires)}")
    return 0
