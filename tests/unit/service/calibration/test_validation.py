"""What a way to compress does to predictions: divergence, and the right answers it leaves."""

from __future__ import annotations

import torch
from compressed import random_ids
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec
from xkv_service.calibration.probes import Probe, ProbedPrefix, right_answers
from xkv_service.calibration.validation import Candidate, validate

WHOLE = Candidate("whole", CompressionSpec(rank_k="full", rank_v="full", factor_dtype="float32"))
LITTLE = Candidate("little", CompressionSpec(rank_k=1, rank_v=1))


def logits_of(ids: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), 9).float()


def test_an_answer_is_right_when_every_token_of_it_is_the_likeliest() -> None:
    probes = [Probe((1, 2, 3, 4), 3), Probe((1, 2, 3), 3), Probe((1, 5), 1), Probe((1, 2, 6, 7), 3)]
    assert [one.answer for one in probes] == [(3, 4), (), (), (6, 7)]
    said = [3, 4, 0, *(8, 8, 8), 8, *(6, 7, 8)]
    assert right_answers(logits_of(said), probes) == [True, True]
    said[8] = 6
    assert right_answers(logits_of(said), probes) == [True, False]
    assert right_answers(logits_of([8, 8, 8]), probes[1:2]) == []


def answered(model: PreTrainedModel, prefix: torch.Tensor, question: list[int], length: int) -> list[int]:
    """What the model says behind prefix and question."""
    ids = [*prefix.tolist(), *question]
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-length:]


def test_answers_are_counted_beside_those_of_the_exact_cache(model: PreTrainedModel) -> None:
    prefix, question = random_ids(80, seed=4), [5, 6, 7]
    known = answered(model, prefix, question, 3)
    wrong = [(one + 1) % 96 for one in known]
    probes = tuple(Probe((*question, *reply), 4) for reply in (known, known, known, wrong))
    asked = ProbedPrefix("asked", tuple(prefix.tolist()), probes)
    text = ProbedPrefix.of_text("text", random_ids(60, seed=9).tolist())
    found = validate(model, [asked, text], [WHOLE, LITTLE], SelectionSpec("dense"))
    whole, little = (found[one].as_dict() for one in ("whole", "little"))
    assert (whole["answers"], whole["answers_exact"], whole["questions"]) == (0.75, 0.75, 4)
    assert (little["answers"], little["answers_exact"], little["questions"]) == (0.0, 0.75, 4)
    assert whole["documents"] == little["documents"] == 2


def test_documents_without_questions_have_no_answers(model: PreTrainedModel) -> None:
    text = ProbedPrefix.of_text("text", random_ids(60, seed=9).tolist())
    found = validate(model, [text], [WHOLE], SelectionSpec("dense"))["whole"].as_dict()
    assert not {"answers", "answers_exact", "questions"} & found.keys()
