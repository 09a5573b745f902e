"""What engines and lookups count, by name, and what each counter says: all are in /metrics at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from xkv_service.engine.messages import MissReason

_FAILURES = get_args(MissReason)

REMAKES: Mapping[str, str] = {
    "remakes_asked": "Lost prefixes that were asked to be made again",
    "remakes_impossible": "Lost prefixes of which it is not known what they were made from",
}
"""Of engines and of lookups."""

_RUNNING = {
    "prompt_tokens": "Tokens of prompts that were begun",
    "cached_tokens": "Those of them that were held already",
    "generated_tokens": "Tokens chosen, those that end answers too",
    "steps": "Forwards of the batch",
    "step_tokens": "Tokens that they ran",
    "step_seconds": "Seconds that they took",
    "head_starts": "Forwards that were begun while their prefix was read, and used",
    "head_start_tokens": "Tokens that they ran",
    "from_artifact": "Requests that went on from an artifact's factors",
    "from_part": "Those of them that had a part of its columns",
    "without_artifact": "Requests that did not",
    **{f"miss_{reason}": f"Requests begun with the miss {reason}" for reason in _FAILURES},
    "ended_finished": "Requests whose answer is whole",
    "ended_cancelled": "Requests whose client left",
    "ended_queue_timeout": "Requests that waited too long to be begun",
    "ended_timeout": "Requests that took too long",
    "ended_no_memory": "Requests for which there was no memory",
    "ended_failed": "Requests that failed",
    "ended_abandoned": "Requests that the end of the engine broke off",
}
_PREFIXES = {
    "hits": "Times that a prefix was in memory",
    "loads": "Prefixes loaded",
    "part_loads": "Parts of prefixes among them",
    "loaded_bytes": "Bytes read for them",
    "load_seconds": "Seconds that they took",
    "damaged": "Loads that found damage",
    "missing": "Loads that found no blob where one is listed",
    "evictions": "Prefixes and calibrations that had to leave memory",
    "pinned_evictions": "Pinned ones among them",
    **{f"failed_{reason}": f"Waits for a load that ended with {reason}" for reason in _FAILURES},
}
_TAILS = {
    "stored": "Tails of conversations written to the store",
    "stored_bytes": "Bytes written for them",
    "store_seconds": "Seconds that writing took",
    "loaded": "Tails brought back",
    "loaded_bytes": "Bytes read for them",
    "load_seconds": "Seconds from asking for a tail until it was there",
    "none": "Requests for which no stored tail helped",
    "not_worth": "Tails that were not written, since computing them is faster",
    "lost_queue_full": "Tails not written: too many at once",
    "lost_closing": "Tails not written at the end: not in time, or no room beside those used later",
    "lost_unavailable": "Tails not written: no Redis or store",
    "lost_too_large": "Tails not written: larger than all may be",
    "lost_failed": "Tails not written: an error of the server's own",
    "failed_slow_load": "Stored tails not used: computing was faster",
    "failed_no_prefix": "Stored tails not used: their prefix was not in memory",
    "failed_corrupt": "Stored tails not used: damaged",
    "failed_evicted": "Stored tails not used: gone",
    "failed_foreign": "Stored tails not used: of something else than is listed",
    "failed_unavailable": "Stored tails not looked for or not read: no Redis or store",
    "failed_diverges": "Stored tails not used: their tokens are not the prompt's",
}

ENGINE_COUNTERS: Mapping[str, str] = {
    **_RUNNING,
    **{f"prefixes_{name}": text for name, text in _PREFIXES.items()},
    **{f"tails_{name}": text for name, text in _TAILS.items()},
    **REMAKES,
}
