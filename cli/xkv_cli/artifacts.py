"""`xkv ls`, `show`, `verify` and `rm`: what is in a store."""

from __future__ import annotations

import click

from xkv_cli.options import json_option, store_options


@click.command()
@store_options
@json_option
def ls(store_url: str, redis_url: str | None, as_json: bool) -> int:
    """List the artifacts in the store, last used first, and say what conversations of a server take there.

    A fidelity marked with "!" is low: answers from that artifact may well be wrong. One that is "missing"
    has lost its file, though nobody removed it with `xkv rm`.

    \b
    Examples:
      xkv ls
      xkv ls --store s3://bucket/kv --redis redis://host:6379/0
      xkv ls --json | jq '.artifacts[].document'

    \b
    With --json, one object:
      {"artifacts": [{"id", "document", "tokens", "bytes", "bytes_full", "ratio", "fidelity", "kl",
                      "low", "kl_limit", "missing", "model", "namespace", "created", "last_used", ...}],
       "stored_tails": {"tails", "bytes"}}
    low: null where the artifact cannot be read. kl_limit: nats of kl above which it is, by the artifact's
    calibration; null without one, where a fidelity below 0.9 is low. missing: whether its file is gone.
    """
    from dataclasses import asdict

    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.verdicts import Verdicts

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        entries = store.entries(on_fault=lambda fault: render.complain(fault.message, fault.hint))
        missing = store.missing([entry.id for entry in entries])
        tails = store.tails.usage()
        verdicts = Verdicts(store).of_entries(entry for entry in entries if entry.id not in missing)
    if as_json:
        artifacts = [
            {**render.entry_fields(entry, verdicts.get(entry.id)), "missing": entry.id in missing}
            for entry in entries
        ]
        render.as_json({"artifacts": artifacts, "stored_tails": asdict(tails)})
    else:
        low = {artifact_id for artifact_id, one in verdicts.items() if one.low}
        render.entries(entries, low, missing)
        render.stored_tails(tails)
    return 0


@click.command()
@click.argument("artifact", metavar="ID")
@store_options
@json_option
def show(artifact: str, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Show one artifact: model, document, ranks, fidelity.

    The verdict says whether its fidelity is low, above which limit (nats of KL divergence), and whose limit
    that is: the artifact's calibration's, written when it was made, or else of the calibration in the store.

    ID may be shortened to its first digits (4 or more) as long as they are unique.

    \b
    Examples:
      xkv show 3fa9c1
      xkv show 3fa9c1 --json
    """
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import describe, resolve

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        found = describe(store, resolve(store, artifact))
    render.as_json(found.as_dict()) if as_json else render.description(found)
    return 0


@click.command()
@click.argument("artifacts", metavar="[ID...]", nargs=-1)
@store_options
@json_option
def verify(artifacts: tuple[str, ...], store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Re-read every byte of all artifacts and calibrations, or of those given, and check it.

    Names each artifact that fails, also one that cannot be decoded since the calibration whose bases it
    shares is gone or damaged. Nothing is changed: a bad artifact is put aside when it is next loaded, or
    remove it with `xkv rm` and compute it again.

    \b
    Examples:
      xkv verify
      xkv verify 3fa9c1 77d0

    \b
    With --json, one object:
      {"artifacts", "calibrations", "failed", "faults": [{"id", "reason"}]}

    Exit status: 0 every byte is as written, 1 some artifact is not.
    """
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import resolve_any

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        ids = [resolve_any(store, artifact) for artifact in artifacts] or None
        results = list(store.verify(ids))
    bad = [result for result in results if result.fault is not None]
    if as_json:
        faults = [{"id": result.artifact_id, "reason": result.fault} for result in bad]
        calibrations = sum(result.calibration for result in results)
        counts = {"artifacts": len(results) - calibrations, "calibrations": calibrations}
        render.as_json({**counts, "failed": len(bad), "faults": faults})
    else:
        render.verification(results)
    return 1 if bad else 0


@click.command()
@click.argument("artifact", metavar="ID")
@store_options
@json_option
def rm(artifact: str, store_url: str, redis_url: str | None, as_json: bool) -> int:
    """Remove one artifact from the store and the catalog.

    \b
    Example:
      xkv rm 3fa9c1

    \b
    With --json, one object:
      {"removed": ID}
    """
    from xkv_artifacts.errors import ArtifactNotFound
    from xkv_artifacts.store import ArtifactStore
    from xkv_cli import render
    from xkv_workers.inventory import resolve

    with ArtifactStore.open(store_url, redis_url, create=False) as store:
        found = resolve(store, artifact)
        if not store.remove(found):
            raise ArtifactNotFound(f"artifact {found} is not in {store_url}")
    render.as_json({"removed": found}) if as_json else click.echo(f"removed {found}")
    return 0
