"""`xkv gc` without --orphans: its options, and what it says it deleted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from xkv_artifacts.reports import Collection, Excess, TailUsage

Command = TypeVar("Command", bound=Callable[..., Any])
_REASONS = {"expired": "had ended", "quota": "over a quota", "budget": "over the budget"}


def _size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    from xkv_artifacts.errors import InvalidLimits
    from xkv_artifacts.limits import parse_size

    try:
        return None if text is None else parse_size(text)
    except InvalidLimits as error:
        raise click.BadParameter(f"{error.message}: {error.hint}") from None


def collection_options(command: Command) -> Command:
    """--budget, --limits and --dry-run."""
    budget = click.option(
        "--budget",
        callback=_size,
        metavar="SIZE",
        help="Bytes of the whole store, as 100GB or 1.5TiB, for this run instead of the limits' own.",
    )
    limits = click.option(
        "--limits",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Limits for this run instead of those in the store.",
    )
    dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
    return budget(limits(dry_run(command)))


def collect(
    store_url: str,
    redis_url: str | None,
    budget: int | None,
    limits_file: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Collect in a store and say what was deleted; the exit status.

    Raises:
        XKVError
    """
    from xkv_artifacts.limits import limits_of_file
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        limits = store.limits() if limits_file is None else limits_of_file(limits_file)
        if budget is not None:
            limits = limits.model_copy(update={"budget": budget})
        result = store.collect(limits, dry_run=dry_run, only_if_enough=True)
        left = store.tails.usage()
    if as_json:
        render.as_json(_as_dict(result, left))
    else:
        _show(result)
        _show_tails(result, left)
    return 1 if result.excess else 0


def _as_dict(result: Collection, left: TailUsage) -> dict[str, Any]:
    artifacts = [
        {"id": removal.artifact_id, **{k: v for k, v in asdict(removal).items() if k != "artifact_id"}}
        for removal in result.removed
    ]
    counts = {"removed": len(artifacts), "bytes": result.bytes, "in_use": result.in_use}
    excess = [asdict(excess) for excess in result.excess]
    stored = {"stored": result.stored, "artifacts": artifacts, "excess": excess}
    tails = {"removed": result.tails.tails, "bytes": result.tails.bytes}
    tails |= {"left": left.tails, "left_bytes": left.bytes}
    return {"dry_run": result.dry_run, **counts, **stored, "stored_tails": tails}


def _show(result: Collection) -> None:
    from xkv_cli import render

    if result.removed:
        lines = [
            (
                removal.artifact_id[:12],
                removal.namespace,
                render.size(removal.bytes),
                _REASONS[removal.reason],
            )
            for removal in result.removed
        ]
        render.table(("id", "namespace", "stored", "why"), lines, right=("stored",))
    verb = "would be deleted" if result.dry_run else "deleted"
    in_use = f", {result.in_use:,} more are in use" if result.in_use else ""
    noun = "artifact" if len(result.removed) == 1 else "artifacts"
    click.echo(
        f"{len(result.removed):,} {noun} {verb} ({render.size(result.bytes)}){in_use}; "
        f"{render.size(result.stored)} of artifacts are left"
    )
    for excess in result.excess:
        render.complain(_excess(excess), _way_out(excess))


def _show_tails(result: Collection, left: TailUsage) -> None:
    from xkv_cli import render

    if result.tails.tails:
        verb = "would be deleted" if result.dry_run else "deleted"
        noun = "stored tail" if result.tails.tails == 1 else "stored tails"
        click.echo(f"{result.tails.tails:,} {noun} {verb} ({render.size(result.tails.bytes)})")
    render.stored_tails(left)


def _excess(excess: Excess) -> str:
    from xkv_cli import render

    whose = "the store" if excess.namespace is None else f"namespace {excess.namespace}"
    over = [render.size(excess.bytes)] if excess.bytes else []
    over += [f"{excess.artifacts:,} artifacts"] if excess.artifacts else []
    if excess.untouched:
        return (
            f"{whose} is {' and '.join(over)} over its limit, and nothing was deleted for that: what cannot "
            f"be deleted is over it by itself ({render.size(excess.calibration_bytes)} of calibrations, "
            f"{render.size(excess.pinned_bytes)} of pinned artifacts)"
        )
    held = [f"{render.size(excess.pinned_bytes)} of what it holds are pinned"]
    if excess.calibration_bytes:
        held += [f"{render.size(excess.calibration_bytes)} are calibrations, which are never collected"]
    return f"{whose} is still {' and '.join(over)} over its limit; {', '.join(held)}"


def _way_out(excess: Excess) -> str:
    pins = excess.pinned_bytes or not excess.untouched
    ways = ["unpin or remove some (xkv unpin, xkv rm)"] if pins else []
    if excess.calibration_bytes:
        ways += ["remove calibrations that no artifact needs (xkv calibrations ls, xkv calibrations rm)"]
    return ", ".join([*ways, "or raise the limit"])
