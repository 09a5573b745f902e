"""Why a prefix finds no room among those in memory: what of the budget cannot be had, and who has it."""

from __future__ import annotations

from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.pool_loads import CALIBRATION, Load
from xkv_service.engine.residents import Residents


def no_room(load: Load, residents: Residents) -> LoadFailure:
    """The failure of a load that waits in vain. What others hold is in its `fault` alone: it tells what other
    namespaces do."""
    name, needed, budget = load.artifact_id[:12], load.needed_bytes, residents.budget
    needs = f"artifact {name} needs {needed:,} bytes"
    if needed > budget:
        detail = f"{needs}, more than the {budget:,} for prefixes"
        return LoadFailure("no_room", detail, detail)
    holders = ", ".join(f"{what} {count:,}" for what, count in _holders(load, residents) if count)
    detail = (
        f"{needs} of the {budget:,} for prefixes, and those in use, pinned or being loaded leave it no room"
    )
    return LoadFailure("no_room", detail, f"{needs} of the {budget:,} for prefixes, which are: {holders}")


def _holders(load: Load, residents: Residents) -> list[tuple[str, int]]:
    """Bytes of what does not leave for it; the rest of the budget is free, or would be made so."""
    here = residents.values
    in_use = {key for key in residents.holds if not key.startswith(CALIBRATION)}
    pins = frozenset() if load.key in residents.pins else residents.pins  # a pinned one displaces others
    pinned = pins.intersection(here) - in_use
    calibrations = residents.needed_by(in_use | pinned)
    holders = [
        ("prefixes in use", residents.bytes_of(in_use)),
        ("pinned ones besides", residents.bytes_of(pinned)),
        ("calibrations that both need", residents.bytes_of(calibrations)),
        ("reserved for loads", residents.reserved),
    ]
    return [*holders, ("free for it", max(0, residents.budget - sum(count for _, count in holders)))]
