"""What `xkv eval` says on the way where there is no terminal, and of a calibration that is no file."""

from __future__ import annotations

import io
import re

from click.testing import CliRunner

from xkv_cli.evaluation_render import watch
from xkv_cli.main import xkv
from xkv_service.evaluation.harness import Step
from xkv_service.evaluation.results import Results


def noted(total: int) -> list[str]:
    """The lines of a run over so many documents."""
    log = io.StringIO()
    with watch(log, None, "measuring full, xkv") as observe:
        for done in range(1, total + 1):
            observe(Step(done, total, "demo_facts", 4096, Results({})))
    return log.getvalue().splitlines()


def test_a_log_file_gets_a_line_when_it_begins_and_after_each_tenth() -> None:
    first, *others = noted(500)
    assert first == "note: measuring full, xkv" and len(others) == 9
    assert re.fullmatch(r"note: 50 of 500 documents, demo_facts at 4,096: \d+ s", others[0])
    assert others[-1].startswith("note: 450 of 500 documents, ")


def test_few_documents_are_noted_one_by_one_but_the_last() -> None:
    assert [line[:17] for line in noted(3)[1:]] == ["note: 1 of 3 docu", "note: 2 of 3 docu"]
    assert len(noted(1)) == 1


def test_a_calibration_that_is_no_file_is_wrong_usage_with_what_to_give() -> None:
    for given in ("dbe17073ab1d", "auto"):
        result = CliRunner().invoke(xkv, ["eval", "--methods", f"xkv:ratio=8,calibration={given}"])
        assert result.exit_code == 2 and f"cannot read {given}: No such file" in result.output
        told = " ".join(result.output.split())
        assert "takes the path of a calibration's file" in told and "`xkv calibrations ls`" in told
        assert "no folder can be made" not in told
