"""`xkv serve`: start the server and wait."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xkv_cli.conversation_options import BudgetType
from xkv_cli.options import place_options, store_options, wrong_usage
from xkv_cli.sizes import SizeType
from xkv_cli.stop_signals import StopSignals
from xkv_cli.times import TimeType

_LOOK_S = 2.0


class ReplicasType(click.ParamType[tuple[int, int]]):
    """A number of replicas, or from how many to how many."""

    name = "N|N-M"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        least, _, most = str(value).partition("-")
        if (
            not least.isdecimal()
            or not (most or least).isdecimal()
            or not 1 <= int(least) <= int(most or least)
        ):
            self.fail(f"{value!r} is neither a number of replicas (2) nor a range of them (1-4)", param, ctx)
        return int(least), int(most or least)


class NatsType(click.ParamType[float]):
    """A divergence: a number from 0."""

    name = "NATS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            nats = float(value)
        except ValueError:
            nats = math.nan
        if not 0 <= nats < math.inf:
            self.fail(
                f"{str(value)[:40]!r} is not a number of nats from 0: write 0.00025, or 0 for no parts",
                param,
                ctx,
            )
        return nats


@click.command()
@place_options
@store_options
@click.option("--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, metavar="P")
@click.option(
    "--keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Who may use the server (docs/serving.md). Default: XKV_API_KEYS, else everybody on this machine.",
)
@click.option(
    "--published",
    metavar="H",
    help="Address that a container's port is published at, or a proxy in front listens at. Without keys it"
    " must be this machine's own, --host may be any, and only the Host of a request is looked at: let nothing"
    " else reach the port.",
)
@click.option(
    "--open-network",
    is_flag=True,
    envvar="XKV_OPEN_NETWORK",
    help="Let other machines in although there are no keys; or XKV_OPEN_NETWORK=1.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME",
    help="Another name that requests may give to the model, such as the one an application has built in.",
)
@click.option(
    "--replicas",
    type=ReplicasType(),
    default="1",
    show_default=True,
    help="Copies of the model, one per GPU; with a range their number follows the requests.",
)
@click.option(
    "--target-requests",
    type=click.IntRange(1),
    metavar="N",
    help="Requests per replica, running and waiting, above which another one comes. Default: --max-running.",
)
@click.option(
    "--upscale-delay",
    "upscale_delay_s",
    type=TimeType(),
    default="30s",
    show_default=True,
    help="How long there must be more before it comes.",
)
@click.option(
    "--downscale-delay",
    "downscale_delay_s",
    type=TimeType(),
    default="5m",
    show_default=True,
    help="How long fewer replicas must have been enough before one goes. Its answers come to their end.",
)
@click.option(
    "--max-running", type=int, default=16, show_default=True, metavar="N", help="Answers at once per replica."
)
@click.option(
    "--queue-timeout",
    "queue_timeout_s",
    type=TimeType(),
    default="5m",
    show_default=True,
    help="How long a request may wait to be begun before it ends with 503; 0: as long as an answer may take.",
)
@click.option(
    "--lookup-timeout",
    "lookup_timeout_s",
    type=TimeType(),
    envvar="XKV_LOOKUP_TIMEOUT",
    default="1s",
    show_default=True,
    help="How long a prompt waits for the catalog, or XKV_LOOKUP_TIMEOUT; then it is computed.",
)
@click.option(
    "--prefix-memory",
    "prefix_bytes",
    type=SizeType(),
    default="1GiB",
    show_default=True,
    help="Memory of each replica for compressed prefixes.",
)
@click.option(
    "--running-memory",
    "running_bytes",
    type=SizeType(),
    default="0",
    show_default=True,
    help="Memory of each replica for answers under way, besides prefixes: what needs more waits. 0: on a GPU "
    "what is free when it starts, less the other budgets; on CPUs no limit.",
)
@click.option(
    "--rebuilt-memory",
    "rebuilt_bytes",
    type=SizeType(),
    default="0",
    show_default=True,
    help="GPU memory of each replica for all keys and values of prefixes that 8 or more requests decode from "
    "at once; 0: each chooses tokens.",
)
@click.option(
    "--tail-memory",
    "tail_bytes",
    type=SizeType(),
    default="1GiB",
    show_default=True,
    help="Memory of each replica for conversations between their turns.",
)
@click.option(
    "--stored-tails",
    "stored_tail_bytes",
    type=SizeType(),
    default="4GiB",
    show_default=True,
    help="Room in the store for conversations that had to leave that memory; 0: they are forgotten.",
)
@click.option(
    "--stored-tail-ttl",
    "stored_tail_ttl_s",
    type=TimeType(),
    default="1h",
    show_default=True,
    help="How long they stay there.",
)
@click.option(
    "--budget",
    type=BudgetType(),
    help="Tokens of a prefix to rebuild for each new token, or their share of it. Default: a sixteenth.",
)
@click.option(
    "--min-fidelity",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    metavar="F",
    help="Artifacts that agree less with the exact cache are not used.",
)
@click.option(
    "--part-kl",
    type=NatsType(),
    default=2.5e-4,
    show_default=True,
    help="Where all of an artifact takes longer to load than to compute, a part of it that was measured"
    " (xkv precompute --parts) and is at most so far from the exact cache answers; 0: none does.",
)
@click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    default="json",
    show_default=True,
    help="Of the log files: one JSON object a line, or lines for people. No prompt or answer is in them.",
)
@click.option(
    "--stop-grace",
    "stop_grace_s",
    type=TimeType(),
    default="10s",
    show_default=True,
    help="When it is stopped: how long running answers may take to end.",
)
def serve(**options: Any) -> int:
    """Answer OpenAI's API from compressed prefixes.

    Chats and completions whose prompts begin like a stored prefix are decoded from its factors; everything
    else is computed as usual. Answers say which prefix served them, or why none did.

    \b
    Examples:
      xkv serve                                        the bundled model at http://127.0.0.1:8000
      xkv serve --model ./llama --keys keys.json --host 0.0.0.0
      xkv serve --ray-address auto --redis redis://host:6379/0 --store s3://bucket/kv --replicas 2-8

    \b
    Then point any OpenAI client at it:
      OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")

    Ctrl-C or SIGTERM stops it: it takes no more requests, and running answers get --stop-grace to end; a
    second one breaks them off at once. While it starts, one ends it. Exit status: 0 stopped, 1 it could not
    start or go on, 2 wrong usage.
    """
    signals = StopSignals()
    try:
        return _serve(signals, options)
    except BaseException:  # others make errors of their own of a SystemError
        if not signals.broke_off_start:
            raise
        click.echo("stopped before it had started", err=True)
        return 0


def _refuse_idle(options: dict[str, Any]) -> None:
    """Refuse options that were given, and do nothing beside the others.

    Raises:
        click.UsageError: there is one.
    """
    idle: dict[str, str] = {}
    least, most = options["replicas"]
    if least == most:
        reason = f"is for replicas whose number changes, and --replicas is {least}: give --replicas N-M"
        idle |= dict.fromkeys(("target_requests", "upscale_delay_s", "downscale_delay_s"), reason)
    if not options["stored_tail_bytes"]:
        idle["stored_tail_ttl_s"] = (
            "is for what --stored-tails has room for, and that is 0: leave one of them out"
        )
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in idle and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} {idle[name]}")


def _serve(signals: StopSignals, options: dict[str, Any]) -> int:
    from xkv_service.api.settings import APISettings
    from xkv_service.engine.settings import EngineSettings
    from xkv_service.errors import InvalidSpec
    from xkv_service.selection.spec import SelectionSpec
    from xkv_workers.serving.ending import drain
    from xkv_workers.serving.scaling import Scaling
    from xkv_workers.serving.server import ServeRequest, serving

    _refuse_idle(options)
    budget, stop_grace_s = options.pop("budget"), options.pop("stop_grace_s")
    limits = (
        "max_running",
        "running_bytes",
        "rebuilt_bytes",
        "tail_bytes",
        "stored_tail_bytes",
        "stored_tail_ttl_s",
    )
    engine = {name: options.pop(name) for name in limits}
    delays = {name: options.pop(name) for name in ("target_requests", "upscale_delay_s", "downscale_delay_s")}
    api = {
        name: options.pop(name)
        for name in (
            "queue_timeout_s",
            "lookup_timeout_s",
            "min_fidelity",
            "part_kl",
            "open_network",
            "published",
        )
    }
    try:
        selection = SelectionSpec() if budget is None else SelectionSpec(budget=budget)
        request = ServeRequest(
            engine=EngineSettings(selection=selection, **engine),
            api=APISettings(**api),
            scaling=Scaling(*options.pop("replicas"), **delays),
            **options,
        )
    except InvalidSpec as error:
        raise wrong_usage(error) from None
    if sys.stderr.isatty():
        click.echo("starting: Ray and the model take half a minute or more", err=True)
    with serving(request) as server:
        signals.started()
        click.echo(f"{server.model} at {server.url}/v1, prefixes from {server.store_url}", err=True)
        for note in server.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"status page at {server.url}/, logs in {server.logs}", err=True)
        while not signals.stop.wait(_LOOK_S):
            server.check()
        click.echo("stopping", err=True)
        if not drain(stop_grace_s, signals.hurry, server.url):
            click.echo("warning: requests that were under way may have been cut off", err=True)
    return 0
