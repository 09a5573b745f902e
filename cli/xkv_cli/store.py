"""`xkv index rebuild` and `xkv gc`: the store as a whole."""

from __future__ import annotations

import click

from xkv_cli.options import json_option, store_options


@click.group()
def index() -> None:
    """The catalog in Redis, which can always be made again from the store."""


@index.command()
@store_options
@json_option
def rebuild(store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Make the catalog again from the store's files alone.

    For a Redis that was emptied, replaced or damaged. What cannot be read is named and left out.

    \b
    Example:
      xkv index rebuild --store /data/xkv --redis redis://new-host:6379/0

    \b
    With --json, one object:
      {"artifacts", "calibrations", "failed", "faults": [{"id", "reason"}]}

    Exit status: 0 everything is listed, 1 something could not be read.
    """
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        result = store.rebuild()
    if as_json:
        faults = [{"id": bad.artifact_id, "reason": bad.fault} for bad in result.faults]
        counts = {"artifacts": result.artifacts, "calibrations": result.calibrations}
        render.as_json({**counts, "failed": len(faults), "faults": faults})
    else:
        click.echo(f"{result.artifacts} artifacts listed")
        if result.calibrations:
            click.echo(f"{result.calibrations} calibrations listed")
        render.faults(result.faults)
    return 1 if result.faults else 0


@click.command()
@click.option("--orphans", is_flag=True, required=True, help="What killed processes left behind.")
@store_options
@json_option
def gc(orphans: bool, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Clean up the store. No artifact or calibration is ever deleted by this.

    Deletes temporary files of dead writers and what a broken-off `xkv calibrate` left a week ago or earlier,
    drops catalog entries without a file, and lists files without an entry. Safe while other processes work.

    \b
    Example:
      xkv gc --orphans

    \b
    With --json, one object:
      {"files", "bytes", "entries_dropped", "blobs_listed", "sums"}
    """
    from dataclasses import asdict

    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        result = store.collect_orphans()
    if as_json:
        render.as_json(asdict(result))
    else:
        click.echo(
            f"{result.files} temporary files deleted ({render.size(result.bytes)}), {result.entries_dropped}"
            f" entries without a file dropped, {result.blobs_listed} files without an entry listed,"
            f" {result.sums} broken-off calibrations deleted"
        )
    return 0
