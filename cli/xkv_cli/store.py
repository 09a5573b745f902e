"""`xkv index rebuild`, `xkv gc` and `xkv pack`: the store as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from xkv_cli.collection import collect, collection_options
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
        for count, noun in ((result.artifacts, "artifact"), (result.calibrations, "calibration")):
            if count or noun == "artifact":
                click.echo(f"{count} {noun}{'' if count == 1 else 's'} listed")
        render.faults(result.faults)
    return 1 if result.faults else 0


@click.command()
@click.option("--orphans", is_flag=True, help="Only what killed processes left behind.")
@collection_options
@store_options
@json_option
def gc(
    orphans: bool,
    budget: int | None,
    limits: Path | None,
    dry_run: bool,
    store_url: str,
    redis_url: str | None,
    as_json: bool,
) -> int:
    """Clean up the store: what has ended, what is beyond its limits, what killed processes left behind.

    Deletes artifacts and stored tails of conversations whose time to live is over, then, while a namespace
    is beyond its quota or the store beyond its budget, those artifacts that were not used for longest. Limits
    are those in the store's file limits.json, if it has one. Never deletes what is pinned, or read or
    computed at this moment, nor any calibration; and nothing for a budget that pins and calibrations
    alone exceed.

    With --orphans it deletes no artifact: it deletes temporary files of dead writers, what a broken-off
    `xkv calibrate` left a week ago or earlier, and stored tails that the catalog lost, drops catalog entries
    without a file, and lists files without an entry. Both are safe while other processes work.

    \b
    Examples:
      xkv gc
      xkv gc --budget 100GB --dry-run
      xkv gc --orphans

    \b
    With --json, one object; "excess" are limits that are exceeded all the same:
      {"dry_run", "removed", "bytes", "in_use", "stored",
       "artifacts": [{"id", "namespace", "bytes", "reason": "expired"|"quota"|"budget"}],
       "excess": [{"namespace", "bytes", "artifacts", "pinned_bytes", "calibration_bytes",
                   "untouched"}],
       "stored_tails": {"removed", "bytes", "left", "left_bytes"}}
    and with --orphans:
      {"files", "bytes", "entries_dropped", "blobs_listed", "sums", "tails"}

    Exit status: 0 all limits are kept, 1 one is not, since the rest is pinned, in use or calibrations.
    """
    if not orphans:
        return collect(store_url, redis_url, budget, limits, dry_run=dry_run, as_json=as_json)
    if budget is not None or limits is not None or dry_run:
        raise click.UsageError("--orphans deletes no artifact: run it without the other options")
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
            f" {result.sums} broken-off calibrations and {result.tails} unlisted stored tails deleted"
        )
    return 0


@click.command()
@click.argument("artifacts", metavar="[ID...]", nargs=-1)
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="N",
    help="Only artifacts that nobody loaded for N days. Default: 0, all.",
)
@click.option("--undo", is_flag=True, help="Make them plain files again.")
@store_options
@json_option
def pack(
    artifacts: tuple[str, ...],
    unused_days: float,
    undo: bool,
    store_url: str,
    redis_url: str | None,
    as_json: bool,
) -> int:
    """Code artifacts without loss for cold storage: a tenth to a seventh fewer bytes.

    All artifacts in the store, or those given. They are found, read and checked as before; loading one costs
    its decoding besides, and always reads the whole file. Needs the package zstandard (the extra "zstd").

    \b
    Examples:
      xkv pack --store s3://bucket/cold --redis redis://host:6379/0
      xkv pack --unused-days 30
      xkv pack 3fa9c1 --undo

    \b
    With --json, one object:
      {"changed", "bytes_before", "bytes_after"}
    """
    import time

    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import resolve

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        wanted = {resolve(store, artifact) for artifact in artifacts}
        before = {
            entry.id: entry.bytes
            for entry in store.entries(on_fault=lambda fault: render.complain(fault.message, fault.hint))
            if (not wanted or entry.id in wanted) and entry.last_used <= time.time() - unused_days * 86400
        }
        changed = [artifact_id for artifact_id in before if store.pack(artifact_id, undo=undo)]
        after = sum(store.blobs.size(artifact_id) for artifact_id in changed)
    was = sum(before[artifact_id] for artifact_id in changed)
    if as_json:
        render.as_json({"changed": len(changed), "bytes_before": was, "bytes_after": after})
    else:
        done = "unpacked" if undo else "packed"
        click.echo(f"{len(changed)} artifacts {done}: {render.size(was)} before, {render.size(after)} now")
    return 0
