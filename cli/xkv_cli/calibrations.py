"""`xkv calibrations`: what models' layers share, as the store keeps it."""

from __future__ import annotations

from pathlib import Path

import click

from xkv_cli.calibration_pages import check_pages, page_options, write_pages
from xkv_cli.options import json_option, store_options


@click.group()
def calibrations() -> None:
    """What a model's layers share, measured once; artifacts made with it need it.

    \b
    Examples:
      xkv calibrations ls
      xkv calibrations show 3fa9c1
    """


@calibrations.command()
@store_options
@json_option
def ls(store_url: str, redis_url: str | None, as_json: bool) -> int:
    """List the calibrations in the store, newest first.

    \b
    Examples:
      xkv calibrations ls
      xkv calibrations ls --json | jq '.calibrations[].id'

    \b
    With --json, one object:
      {"calibrations": [{"id", "model", "fingerprint", "documents", "tokens", "groups", "created", "bytes"}]}
    """
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import calibration_render, render

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        entries = store.calibrations.entries(
            on_fault=lambda fault: render.complain(fault.message, fault.hint)
        )
    if as_json:
        render.as_json({"calibrations": [entry.model_dump(mode="json") for entry in entries]})
    else:
        calibration_render.entries(entries)
    return 0


@calibrations.command()
@click.argument("calibration", metavar="ID")
@store_options
@page_options
@json_option
def show(
    calibration: str,
    store_url: str,
    redis_url: str | None,
    as_json: bool,
    report: Path | None,
    plots: Path | None,
) -> int:
    """Show one calibration: model, sample, settings, groups, figures.

    ID may be shortened to its first digits (4 or more) as long as they are unique. Of the figures, lists and
    tables are left out but for what each ratio costs; --report and --plots show them. Warnings say why the
    sample is too small, or a ratio too high.

    \b
    Examples:
      xkv calibrations show 3fa9c1
      xkv calibrations show 3fa9c1 --report calibration.html --plots pictures
      xkv calibrations show 3fa9c1 --json
    """
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import calibration_render, render
    from xkv_service.calibration.report.about import report_figures
    from xkv_workers.inventory import describe_calibration, resolve_calibration

    check_pages(plots)
    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        found = describe_calibration(store, resolve_calibration(store, calibration))
    render.as_json(found.as_dict()) if as_json else calibration_render.description(found)
    write_pages(report_figures(found.manifest), report, plots)
    return 0


@calibrations.command()
@click.argument("calibration", metavar="ID")
@store_options
@click.option("--force", is_flag=True, help="Remove it even if stored artifacts cannot be used without it.")
@json_option
def rm(calibration: str, store_url: str, redis_url: str | None, force: bool, as_json: bool) -> int:
    """Remove one calibration from the store and the catalog.

    Refused while artifacts in the store have its bases: they could not be used any more.

    \b
    Examples:
      xkv calibrations rm 3fa9c1
      xkv calibrations rm 3fa9c1 --force

    \b
    With --json, one object:
      {"removed": ID}
    """
    from xkv_artifacts.errors import ArtifactNotFound
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import refuse_needed, resolve_calibration

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        found = resolve_calibration(store, calibration)
        if not force:
            refuse_needed(store, found)
        if not store.calibrations.remove(found):
            raise ArtifactNotFound(f"calibration {found} is not in {store_url}")
    render.as_json({"removed": found}) if as_json else click.echo(f"removed {found}")
    return 0
