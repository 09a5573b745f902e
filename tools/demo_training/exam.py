"""The closing exam: held-out conversations, answered by teacher forcing (right: what greedy says)."""

from pathlib import Path
from typing import Any

import torch

from demo_training.batches import ExamData, Shape, stream
from demo_training.network import Network
from demo_training.scores import right_answers
from xkv_service.demo import ruler_tasks

_TURNS = 5
_ROOM = 512


def sit_exam(
    network: Network,
    folder: Path,
    lengths: tuple[int, ...],
    documents: int,
    tokens_per_step: int,
    workers: int,
) -> list[dict[str, Any]]:
    """Return one record for each length and task: exact match of the first turn and of turns 1 to 5.

    A first answer is right when every token of it is the likeliest one, which is what greedy decoding gives.
    """
    records = []
    for tokens in lengths:
        for task in (None, *ruler_tasks.TASKS):
            count = documents if task is None else max(1, documents // 8)
            shape = Shape(max(1, tokens_per_step // (tokens + _ROOM)), tokens + _ROOM)
            data = ExamData(folder, tokens, shape, _TURNS, task)
            turns = _turns(network, stream(data, 0, -(-count // shape.rows), workers))
            asked = [int(n) for n in turns[0]]
            right = [round(float(r / max(n, 1)), 4) for n, r in zip(*turns, strict=True)]
            record = {"task": task or "documents", "tokens": tokens, "asked": asked, "right_by_turn": right}
            print(record, flush=True)
            records.append(record)
    return records


@torch.no_grad()
def _turns(network: Network, batches: Any) -> tuple[list[float], list[float]]:
    """Return how many questions were asked and rightly answered at each turn."""
    device = next(network.model.parameters()).device
    asked, right = torch.zeros(_TURNS), torch.zeros(_TURNS)
    for batch in batches:
        ids, answers, kinds = (t.to(device) for t in (batch.ids.long(), batch.answers, batch.kinds))
        with torch.autocast(device.type, torch.bfloat16):
            _, hits = network(ids)
        good = right_answers(hits, answers, kinds)
        asked += (kinds >= 0).sum(0)[:_TURNS].cpu()
        right += good.sum(0)[:_TURNS].cpu()
    return asked.tolist(), right.tolist()
