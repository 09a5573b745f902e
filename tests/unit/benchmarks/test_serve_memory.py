"""What the serving benchmark reads of a server's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from serve import gauges_in, mib_a_session

METRICS = """# TYPE xkv_sessions gauge
xkv_sessions{{state="kept"}} {kept}
xkv_resident_bytes{{kind="tails"}} {tails}
xkv_resident_bytes{{kind="prefixes"}} 4096.0
xkv_engine_tails_stored_total {stored}
xkv_engine_tails_stored_bytes_total 1e+09
xkv_engine_tails_lost_queue_full_total {lost}
xkv_engine_tails_loaded_total 7.0
"""


def gauges(kept: float, tails: float, stored: float = 0.0, lost: float = 0.0) -> dict[str, float]:
    return gauges_in(METRICS.format(kept=kept, tails=tails, stored=stored, lost=lost))


def test_the_memory_of_a_session_is_that_of_the_kept_ones() -> None:
    assert mib_a_session(gauges(1, 2**20), gauges(4, 12 * 2**20)) == 3
    # What left before the cell began says nothing of it.
    assert mib_a_session(gauges(1, 2**20, 5, 5), gauges(2, 2**20, 5, 5)) == pytest.approx(0.5)


@pytest.mark.parametrize("after", [gauges(4, 2**20, stored=1), gauges(4, 2**20, lost=1), gauges(0, 0)])
def test_it_is_unknown_where_conversations_left(after: dict[str, float]) -> None:
    assert mib_a_session(gauges(2, 2**20), after) is None
