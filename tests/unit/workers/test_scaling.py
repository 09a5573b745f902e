"""How many replicas there are to be."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_service.errors import InvalidSpec
from xkv_workers.serving.scaling import Scaling


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 0},
        {"most": 1.5},
        {"least": 3, "most": 2},
        {"target_requests": 0},
        {"upscale_delay_s": -1},
        {"downscale_delay_s": float("nan")},
        {"downscale_delay_s": float("inf")},
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match=next(iter(wrong))):
        Scaling(**wrong)


@pytest.mark.parametrize(("delay_s", "look_back_s"), [(0, 12), (20, 20), (30, 30), (600, 30)])
def test_requests_are_averaged_for_no_longer_than_needed(delay_s: float, look_back_s: float) -> None:
    assert Scaling(upscale_delay_s=delay_s).look_back_s == look_back_s
