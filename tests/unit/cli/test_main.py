"""The `xkv` command without its work: help, usage errors, what is imported."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from xkv_cli.main import xkv

XKV = [sys.executable, "-m", "xkv_cli"]
COMMANDS = [
    "precompute",
    "ask",
    "ls",
    "show",
    "verify",
    "rm",
    "pin",
    "unpin",
    "ttl",
    "index rebuild",
    "gc",
    "pack",
    "analyze",
    "eval",
    "doctor",
]
COMMANDS += [f"calibrations {command}" for command in ("ls", "show", "rm")]
HEAVY = ("torch", "ray", "transformers", "redis", "pydantic", "numpy", "fsspec")


def test_help_imports_nothing_heavy() -> None:
    for arguments in (
        ["--help"],
        ["ls", "--help"],
        ["calibrations", "ls", "--help"],
        ["gc", "--help"],
        ["ttl", "--help"],
        ["precompute", "--help"],
        ["eval", "--help"],
        ["ask", "--help"],
    ):
        script = (
            "import sys\nfrom xkv_cli.main import xkv\n"
            f"xkv.main({arguments!r}, standalone_mode=False)\n"
            f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]", arguments


def test_help_is_quick() -> None:
    best = min(processor_seconds([*XKV, "--help"]) for _ in range(3))
    assert best < 0.5, f"{best:.2f} s"


def processor_seconds(command: list[str]) -> float:
    """What others do on the machine meanwhile does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command: str) -> None:
    done = CliRunner().invoke(xkv, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert "Example" in done.output and "--json" in done.output


def test_the_help_names_the_commands_that_have_no_json() -> None:
    without = [name for name, command in commands(xkv) if not any("--json" in p.opts for p in command.params)]
    *first, last = without
    said = " ".join(CliRunner().invoke(xkv, ["--help"]).output.split())
    assert f"Every command but {', '.join(first)} and {last} takes --json" in said


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, in the order of the help."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from commands(command) if isinstance(command, click.Group) else [(name, command)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["precompute"],
        ["precompute", "--docs", "does-not-exist"],
        ["precompute", "--docs", ".", "--rank-k", "many"],
        ["precompute", "--docs", ".", "--min-fidelity", "2"],
        ["precompute", "--docs", ".", "--workers", "0"],
        ["show"],
        ["gc", "--orphans", "--budget", "1GB"],
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments: list[str]) -> None:
    done = subprocess.run([*XKV, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Error" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["precompute", "--group-size", "0"], "--group-size=0 is out of range"),
        (["precompute", "--ratio", "0.5"], "--ratio=0.5 is out of range"),
        (["precompute", "--ratio", "0"], "--ratio=0 is out of range"),
        (["precompute", "--ratio", "1000000000"], "--ratio=1000000000 is out of range"),
        (["precompute", "--rank-k", "4"], "--rank-k and --rank-v go together"),
        (["precompute", "--group-size", "2", "--bits", "4"], "bits 4: with --group-size there is no"),
        (["calibrate", "--group-size", "0"], "--group-size=0 is out of range"),
        (["calibrate", "--group-size", "1025"], "--group-size=1025 is out of range"),
        (["calibrate", "--ratio", "0.5"], "--ratio=0.5 is out of range"),
        (
            ["precompute", "--rank-k", "4", "--rank-v", "4", "--on-low-fidelity", "retry"],
            "--on-low-fidelity=retry halves the ratio",
        ),
    ],
)
def test_wrong_values_are_told_by_the_option_that_was_typed(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(xkv, [*arguments, "--docs", str(tmp_path)])
    assert result.exit_code == 2 and expected in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ttl", "3fa9c1", "-5s"], "'-5s' is below 0: write 90s, 15m, 12h, 7d or none"),
        (["ttl", "-5s", "--json"], "Missing argument 'TIME'"),
        (["ttl", "3fa9c1", "5s", "--jsno"], "unexpected extra argument (--jsno)"),
        (["serve", "--queue-timeout", "-5s"], "'-5s' is below 0: write 90s, 15m, 12h or 7d"),
    ],
)
def test_a_time_below_0_is_no_option(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(xkv, arguments)
    assert result.exit_code == 2 and expected in result.output, result.output


def test_docs_takes_several_paths_after_one_flag(tmp_path: Path) -> None:
    from xkv_cli.precompute import precompute

    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.mkdir()
    for arguments in (
        ["--docs", a, b, c],
        ["--docs", a, "--docs", b, "--docs", c],
        ["--json", "--docs", a, b, "--ratio", "4", "--docs", c],
        [f"--docs={a}", b, c],
    ):
        context = precompute.make_context("precompute", [str(word) for word in arguments])
        assert context.params["paths"] == (a, b, c), arguments


def test_a_word_that_belongs_to_no_option_is_wrong_usage(tmp_path: Path) -> None:
    done = CliRunner().invoke(xkv, ["precompute", "--docs", str(tmp_path), "--json", "stray"])
    assert done.exit_code == 2
    assert "stray" in done.output


def test_the_store_comes_from_option_variable_or_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from xkv_workers.settings import default_store

    monkeypatch.delenv("XKV_STORE", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_store() == str(Path.home() / ".local/share/xkv")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_store() == "/data/xkv"
    monkeypatch.setenv("XKV_STORE", "s3://bucket/kv")
    assert default_store() == "s3://bucket/kv"


def test_an_unexpected_error_is_one_line_unless_debugging() -> None:
    body = "raise ZeroDivisionError('two\\nlines')"
    done = _run_command(body, debug="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: unexpected ZeroDivisionError: two lines"
    assert "Traceback" not in done.stderr
    done = _run_command(body, debug="1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_interrupt_is_one_also_where_compiled_code_met_it() -> None:
    for body in ("raise KeyboardInterrupt", "raise SystemError('an exception set') from KeyboardInterrupt()"):
        done = _run_command(body, debug="")
        assert done.returncode == 130 and done.stderr.strip().startswith("interrupted: ")
    done = _run_command("raise SystemError('its own')", debug="")
    assert done.returncode == 1 and done.stderr.startswith("error: unexpected SystemError: its own")


def _run_command(body: str, debug: str) -> subprocess.CompletedProcess[str]:
    """A command that does that, as the console script would run it."""
    script = (
        "import click, xkv_cli.main as main\n"
        f"@main.xkv.command('boom')\ndef boom():\n    {body}\n"
        "main._COMMANDS['boom'] = ('__main__', 'boom')\n"
        "import sys; sys.argv = ['xkv', 'boom']\nmain.main()"
    )
    environment = {**os.environ, "XKV_DEBUG": debug}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def test_the_documentation_of_the_command_is_up_to_date() -> None:
    tool = Path(__file__).resolve().parents[3] / "tools" / "cli_docs.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], check=False)
    assert done.returncode == 0, "run: python tools/cli_docs.py"
