"""RULER-style tasks: what is asked stands in the haystack, as often as the task says."""

from __future__ import annotations

from random import Random

import pytest

from xkv_service.demo.documents import approximate_tokens
from xkv_service.demo.ruler_tasks import NEEDLE_TASKS, TASKS, make_task


@pytest.mark.parametrize("name", TASKS)
def test_every_sentence_of_an_answer_is_hidden_once(name: str) -> None:
    document = make_task(name, Random(3), 1200, spread=2)
    assert document.questions
    for question in document.questions:
        for sentence in question.answer.removesuffix(".").split(". "):
            assert document.text.count(sentence + ".") == 1
        assert question.kind == name
        assert all(value in question.answer for value in question.values)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_hides_the_same(name: str) -> None:
    assert make_task(name, Random(5), 600) == make_task(name, Random(5), 600)


@pytest.mark.parametrize("name", sorted(NEEDLE_TASKS))
def test_a_question_asks_for_as_many_values_as_the_task_says(name: str) -> None:
    task = NEEDLE_TASKS[name]
    question = make_task(name, Random(1), 800).questions[0]
    assert len(question.values) == task.values * task.queries


def test_several_values_of_a_key_come_smallest_first() -> None:
    question = make_task("niah_multivalue", Random(9), 800).questions[0]
    assert list(question.values) == sorted(question.values)
    assert len({value[0] for value in question.values}) == 4


def test_variables_follow_each_other_in_the_text() -> None:
    document = make_task("variable_tracking", Random(2), 800)
    places = [document.text.index(f"VAR {name} = ") for name in document.questions[0].values]
    assert places == sorted(places)
    assert len(places) == 5


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "variable_tracking"])
def test_length_is_as_wanted(name: str) -> None:
    assert approximate_tokens(make_task(name, Random(0), 3000).text) == pytest.approx(3000, rel=0.1)
