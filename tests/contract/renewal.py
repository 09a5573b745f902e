"""Wait for what a thread does now and then, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

RENEWED_S = 6.0
"""How long a lease or mark of these tests lasts: renewed after 2 s, with 4 s to spare on a slow machine."""


def wait_for_renewal(until: Callable[[], float | None]) -> None:
    """Until the end of a lease or mark has moved away; None: there is none yet."""
    before, deadline = until(), time.monotonic() + 60
    while (now := until()) is None or (before is not None and now <= before):
        assert time.monotonic() < deadline, "it was not renewed"
        before = now
        time.sleep(0.02)
