"""Results as a person reads them, or as one JSON object. Nothing in what is told commands the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xkv_artifacts.entry import Entry
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.reports import TailUsage
from xkv_artifacts.store import Verification
from xkv_cli.plain_text import escaped
from xkv_service.numeric import is_number
from xkv_workers.doctor import Check
from xkv_workers.estimate import Forecast
from xkv_workers.inventory import Description
from xkv_workers.report import LOW_FIDELITY, ArtifactLine, DocumentError, Report
from xkv_workers.verdicts import Verdict

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NAMED = 5
_SHARES = {0.5: "half", 0.75: "three quarters"}


def as_json(result: Mapping[str, Any]) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a whole part."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def percent(share: float | None) -> str:
    """A share of one, or a dash when there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def rows(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    listing = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in pairs:
        listing.add_row(Text(escaped(name)), Text(escaped(value), overflow="fold"))
    _console().print(listing)


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table; the columns named in `right` hold numbers."""
    listing = Table(box=None, pad_edge=False)
    for name in head:
        listing.add_column(name, justify="right" if name in right else "left", no_wrap=name in right)
    for line in lines:
        listing.add_row(*(Text(escaped(cell), overflow="fold") for cell in line))
    _console().print(listing)


def report(result: Report) -> None:
    """The summary of a run; where every document failed, it has no figures of artifacts."""
    rows(
        "",
        [
            ("documents", f"{result.documents:,}"),
            *(_stored(result) if result.artifacts else [("failed", f"{result.failed:,}")]),
            ("time", f"{result.seconds:.1f} s"),
        ],
    )
    for line in result.retried:
        warn(_retried(line))
    if low := result.low_fidelity:
        worst = min(low, key=lambda line: line.fidelity)
        warn(
            f"{len(low)} of {result.documents} documents have a low fidelity, "
            f"the worst {worst.document} ({percent(worst.fidelity)}): answers from them may be wrong. "
            f"Lower --ratio, or refuse them with --on-low-fidelity fail"
        )
    if result.parts is not None and result.parts.unmeasured:
        warn(_unmeasured(result.parts.unmeasured))
    errors(result.errors)


def _stored(result: Report) -> list[tuple[str, str]]:
    return [
        ("computed", f"{result.computed:,}"),
        ("reused", f"{result.reused:,}"),
        ("failed", f"{result.failed:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("exact cache", size(result.bytes_full)),
        ("stored", size(result.bytes_stored)),
        ("ratio", f"{result.ratio:.2f}x" if result.ratio else "-"),
        ("calibration", (result.calibration or "none")[:12]),
        ("fidelity, worst", percent(result.worst_fidelity)),
        ("fidelity, median", percent(result.median_fidelity)),
        *_measured_parts(result),
    ]


def _measured_parts(result: Report) -> list[tuple[str, str]]:
    """Of how many artifacts there are parts to answer from, where the run was to measure them."""
    return [] if result.parts is None else [("with parts", _artifacts(result.parts.measured))]


def _artifacts(count: int) -> str:
    return f"{count:,} artifact{'s' * (count != 1)}"


def _unmeasured(ids: Sequence[str]) -> str:
    named = ", ".join(one[:12] for one in ids[:_NAMED]) + ", ..." * (len(ids) > _NAMED)
    return (
        f"parts of {_artifacts(len(ids))} stored before were not measured ({named}): to have them measured, "
        "remove each with `xkv rm ID` and run xkv precompute --parts again"
    )


def _retried(line: ArtifactLine) -> str:
    assert line.retried is not None
    first = line.retried
    return (
        f"{line.document} was compressed again, to {line.ratio:.1f}x, because its fidelity was low: "
        f"{percent(first.fidelity)} same next token before, {percent(line.fidelity)} now; "
        f"KL {first.kl:.4f} before, {first.kl_now:.4f} now"
    )


def forecast(result: Forecast) -> None:
    """What a run would do."""
    table(
        ("document", "action", "tokens", "exact cache", "stored"),
        [
            (line.document, line.action, f"{line.tokens:,}", size(line.bytes_full), size(line.bytes))
            for line in result.plan
        ],
        right=("tokens", "exact cache", "stored"),
    )
    rows(
        "",
        [
            ("documents", f"{result.documents:,}"),
            ("to compute", f"{result.compute:,}"),
            ("to reuse", f"{result.reuse:,}"),
            ("cannot be done", f"{result.failed:,}"),
            ("tokens to compute", f"{result.tokens:,}"),
            ("exact cache", size(result.bytes_full)),
            ("calibration", (result.calibration or "none")[:12]),
            ("to store", f"at most {size(result.bytes_stored)}"),
            ("time", f"about {result.seconds:.0f} s ({result.seconds_basis})"),
        ],
    )
    errors(result.errors)


def errors(found: Sequence[DocumentError]) -> None:
    """Documents that have no artifact, on stderr."""
    console = Console(stderr=True, highlight=False)
    for error in found:
        told = escaped(f"{error.document}: {error.reason}")
        console.print(Text.assemble(("failed ", "red"), told), soft_wrap=True)


def warn(text: str) -> None:
    """What a person must not overlook, on stderr."""
    told = Text.assemble(("warning ", "yellow"), escaped(text))
    Console(stderr=True, highlight=False).print(told, soft_wrap=True)


def complain(message: str, hint: str = "") -> None:
    """An error on stderr, in one line, and what to do about it in another."""
    sys.stderr.write(f"error: {escaped(message)}\n" + (f"hint: {escaped(hint)}\n" if hint else ""))


def entry_fields(entry: Entry, verdict: Verdict | None) -> dict[str, Any]:
    """An artifact in the catalog and what is said of its fidelity, as plain JSON values."""
    low, limit = (None, entry.kl_limit) if verdict is None else (verdict.low, verdict.limit)
    return {**entry.model_dump(mode="json", exclude={"spec"}), "low": low, "kl_limit": limit}


def entries(found: Sequence[Entry], low: Collection[str] = (), missing: Collection[str] = ()) -> None:
    """A line for each artifact, and how long it is kept where that is said of any.

    Args:
        low: ids of those whose fidelity is; they are marked. missing: of those whose files are gone.
    """
    promised = any(entry.pinned or entry.expires is not None for entry in found)
    head = ("id", "document", "tokens", "stored", "ratio", "fidelity", "created")
    table(
        (*head, "kept") if promised else head,
        [
            (
                entry.id[:12],
                entry.document,
                f"{entry.tokens:,}",
                "missing" if entry.id in missing else size(entry.bytes),
                f"{entry.ratio:.2f}x",
                ("! " if entry.id in low else "") + percent(entry.fidelity),
                date(entry.created)[:10],
                *([_kept(entry)] if promised else []),
            )
            for entry in found
        ],
        right=("id", "tokens", "stored", "ratio", "fidelity", "created"),
    )
    if low:
        _console().print(Text("! low fidelity: answers may be wrong; `xkv show ID` says by which limit"))
    if missing:
        _console().print(Text("missing: the file is gone from the store; `xkv precompute` makes it again"))


def stored_tails(found: TailUsage) -> None:
    """A line about conversations that servers keep in the store, if there are any."""
    if found.tails:
        _console().print(Text(f"stored tails of conversations: {found.tails:,} ({size(found.bytes)})"))


def _kept(entry: Entry) -> str:
    if entry.pinned:
        return "pinned"
    return "" if entry.expires is None else f"to {date(entry.expires)}"


def retention(pinned: bool, expires: float | None) -> str:
    """How long an artifact is kept."""
    ends = "" if expires is None else f"ends {date(expires)}"
    if not pinned:
        return ends or "kept until the store is full"
    return f"pinned; without the pin it {ends}" if ends else "pinned"


def description(found: Description) -> None:
    """Everything about one artifact, then its groups."""
    manifest = found.manifest
    fidelity = manifest.fidelity
    rows(
        "",
        [
            ("id", manifest.id),
            ("document", manifest.document.uri),
            ("document sha256", manifest.document.sha256),
            ("model", f"{manifest.model.name} ({manifest.model.architecture}, {manifest.model.dtype})"),
            ("model fingerprint", manifest.model.fingerprint),
            ("namespace", manifest.namespace),
            ("created", date(manifest.created.timestamp())),
            ("kept", retention(found.entry.pinned, found.entry.expires) if found.entry else "-"),
            ("tokens", f"{manifest.tokens:,}"),
            ("exact cache", size(manifest.bytes_full)),
            ("stored", f"{size(found.bytes)} ({manifest.bytes_full / found.bytes:.2f}x less)"),
            (
                "fidelity",
                f"{percent(fidelity.top1_agreement)} same next token, {fidelity.positions} positions",
            ),
            ("KL divergence", _nats(fidelity.kl)),
            *_parts(manifest),
            ("verdict", _verdict(manifest, found.verdict)),
            *_compressed_again(manifest),
            ("selection index", _index(manifest)),
            ("calibration", str(manifest.spec.get("calibration") or "none")),
            *_kept_exact(manifest),
            ("spec", ", ".join(f"{k}={v}" for k, v in manifest.spec.items() if v is not None)),
        ],
    )
    _groups(manifest)


def _parts(manifest: PrefixManifest) -> list[tuple[str, str]]:
    """What the leading columns alone are worth, where that was measured."""
    return [
        (
            f"leading {_SHARES.get(part.share, f'{100 * part.share:g} %')}",
            f"of columns, in whole blocks: {percent(part.top1_agreement)} same next token, {_nats(part.kl)}",
        )
        for part in manifest.fidelity.parts
    ]


def _nats(kl: float) -> str:
    """A divergence in three digits that count: all of an artifact's, its parts' and limits are compared."""
    return f"{kl:.3g} nats" if kl else "0.0000 nats"


def _verdict(manifest: PrefixManifest, verdict: Verdict) -> str:
    """Whether the fidelity is low, and by which limit."""
    if verdict.limit is None:
        rest = f"{percent(LOW_FIDELITY)} same next token; no calibration sets a limit"
        return f"low: below {rest}" if verdict.low else f"not low: at least {rest}"
    calibration = str(manifest.spec.get("calibration"))[:12]
    limit = f"{_nats(verdict.limit)}, the limit of calibration {calibration}{_at_ratio(manifest)}"
    return f"low: above {limit}" if verdict.low else f"not low: at most {limit}"


def _at_ratio(manifest: PrefixManifest) -> str:
    """The ratio that was asked for; a blob's spec may say anything."""
    ratio = manifest.spec.get("ratio")
    return f" at {ratio:g}x" if is_number(ratio) else ""


def _compressed_again(manifest: PrefixManifest) -> list[tuple[str, str]]:
    """What was tried because the fidelity was low, where anything was."""
    if manifest.instead_of is not None:
        first = f"artifact {manifest.instead_of[:12]}, whose fidelity was low"
        return [("compressed again", f"made{_at_ratio(manifest)} instead of {first}")]
    return [("compressed again", "nothing else was better")] if manifest.retried else []


def _index(manifest: PrefixManifest) -> str:
    """What selective reconstruction finds tokens with. Latents (MLA) have no index of their own."""
    own = str(manifest.spec.get("index", "none"))
    kinds = {
        "none stored: latents are scored by their own factors" if group.latent else own
        for group in manifest.groups
    }
    return "; ".join(sorted(kinds))


def _kept_exact(manifest: PrefixManifest) -> list[tuple[str, str]]:
    """Layers that are not compressed."""
    pairs = []
    if manifest.windows:
        pairs.append(("sliding windows", f"{len(manifest.windows)} layers, kept exact"))
    if manifest.states:
        pairs.append(("linear-attention states", f"{len(manifest.states)} layers, kept exact"))
    return pairs


def _groups(manifest: PrefixManifest) -> None:
    fidelity = manifest.fidelity
    table(
        ("group", "layers", "rank K", "rank V", "error K", "error V"),
        [
            (
                str(number),
                f"{group.layers[0]}-{group.layers[-1]}",
                str(group.rank_k),
                "-" if group.latent else str(group.rank_v),
                percent(key_error),
                percent(None if group.latent else value_error),
            )
            for number, (group, key_error, value_error) in enumerate(
                zip(manifest.groups, fidelity.key_error, fidelity.value_error, strict=False)
            )
        ],
        right=("group", "rank K", "rank V", "error K", "error V"),
    )


def verification(results: Sequence[Verification]) -> None:
    """How many artifacts and calibrations are as written, each that is not, and what to do about those."""
    artifacts = [result for result in results if not result.calibration]
    calibrations = [result for result in results if result.calibration]
    if artifacts or not calibrations:
        _verified(artifacts, "artifacts", "remove it with `xkv rm ID` and run xkv precompute again")
    if calibrations:
        hint = "remove it with `xkv calibrations rm ID` and run xkv calibrate again"
        _verified(calibrations, "calibrations", hint)


def _verified(results: Sequence[Verification], noun: str, hint: str) -> None:
    bad = [result for result in results if result.fault is not None]
    sys.stdout.write(f"{len(results) - len(bad)} of {len(results)} {noun} are as written\n")
    faults(bad)
    if bad:
        sys.stderr.write(f"hint: {hint}\n")


def faults(bad: Sequence[Verification]) -> None:
    """Artifacts and calibrations that cannot be used, on stderr."""
    for result in bad:
        sys.stderr.write(escaped(f"failed {result.artifact_id}: {result.fault}") + "\n")


def checks(found: Sequence[Check]) -> None:
    """A line for each check of this machine, and how to mend what failed."""
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    listing = Table(box=None, pad_edge=False, show_header=False)
    for check in found:
        told = escaped(check.detail) + (f"\nfix: {escaped(check.fix)}" if check.fix else "")
        listing.add_row(Text(check.status, colours[check.status]), Text(check.name), Text(told))
    _console().print(listing)


def date(seconds: float) -> str:
    """A moment on this machine's clock, to the second, and its zone."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _console() -> Console:
    """As wide as the terminal; wide enough to break no line where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)
