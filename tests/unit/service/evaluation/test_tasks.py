"""Every task: as long as asked, the same for the same seed, answerable from its text and from it alone."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.tasks.base import Question, Room, Task, score
from xkv_service.evaluation.tasks.haystack import read_haystack
from xkv_service.evaluation.tasks.reading import read_squad
from xkv_service.evaluation.tasks.registry import Material, find_tasks
from xkv_service.modeling.models import LoadedModel

RULER = find_tasks(["ruler"])
DEMO = find_tasks(["demo"])


def _room(bundled: LoadedModel, tokens: int) -> Room:
    renderer = Renderer(bundled.tokenizer)

    def prompt(document: str, question: Question) -> int:
        return len(renderer.prompt(document, [], question.text, question.answer_prefix))

    return Room(tokens, renderer.measure, prompt)


def _named(tasks: list[Task]) -> list[pytest.param]:
    return [pytest.param(task, id=task.name) for task in tasks]


@pytest.mark.parametrize("task", _named(RULER))
@pytest.mark.parametrize("tokens", [2048, 6000])
def test_prompt_and_reply_are_as_long_as_asked(bundled: LoadedModel, task: Task, tokens: int) -> None:
    room = _room(bundled, tokens)
    sample = task.make(Random("length"), room, 1)
    used = room.prompt(sample.document, sample.questions[0]) + task.reply_tokens
    assert 0 <= tokens - used <= 120, used


@pytest.mark.parametrize("task", _named(RULER + DEMO))
def test_the_same_seed_gives_the_same_sample(bundled: LoadedModel, task: Task) -> None:
    room = _room(bundled, 1500)
    first, second, other = (task.make(Random(seed), room, 1) for seed in (1, 1, 2))
    assert first == second
    assert first.document != other.document


@pytest.mark.parametrize("task", _named(RULER))
def test_every_expected_string_stands_in_the_document(bundled: LoadedModel, task: Task) -> None:
    count = task.most_questions or 5
    sample = task.make(Random("answers"), _room(bundled, 3000), count)
    assert len(sample.questions) == count
    for question in sample.questions:
        assert all(text in sample.document for text in question.expected)
        asked = question.text + question.answer_prefix
        assert not any(text in asked for text in question.expected)
    if count > 1:
        assert len({question.text for question in sample.questions}) == count
        assert len({text for question in sample.questions for text in question.expected}) >= count


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_are_as_many_as_the_definition_says(
    bundled: LoadedModel, name: str, keys: int, values: int, queries: int
) -> None:
    (task,) = find_tasks([name])
    sample = task.make(Random("needles"), _room(bundled, 2000), 1)
    assert sample.document.count(" assigned to ") - 1 == keys * values  # one stands in the introduction
    assert len(sample.questions[0].expected) == values * queries


def test_a_haystack_of_needles_has_nothing_else(bundled: LoadedModel) -> None:
    (task,) = find_tasks(["niah_multikey_2"])
    lines = task.make(Random(0), _room(bundled, 2000), 1).document.split("\n")[2:]
    assert len(lines) > 50 and all(line.startswith("A number assigned to ") for line in lines)


def test_variables_follow_from_one_another(bundled: LoadedModel) -> None:
    (task,) = find_tasks(["vt"])
    sample = task.make(Random(0), _room(bundled, 2000), 2)
    for question in sample.questions:
        value = question.text.split("number ")[1].split()[0]
        held: list[str] = []
        for line in sample.document.split("\n"):
            if line.startswith("VAR "):
                name, source = line[4:].rstrip(".").split(" = ")
                if source == value or source.removeprefix("VAR ") in held:
                    held.append(name)
        assert tuple(held) == question.expected


def test_common_words_are_the_most_common(bundled: LoadedModel) -> None:
    for tokens, often, seldom in ((3000, 6, 1), (9000, 30, 3)):
        (task,) = find_tasks(["cwe"])
        sample = task.make(Random(0), _room(bundled, tokens), 1)
        words = sample.document.split("\n\n")[-1].split()[1::2]
        counts = sorted({word: words.count(word) for word in words}.items(), key=lambda item: -item[1])
        assert {word for word, _ in counts[:10]} == set(sample.questions[0].expected)
        assert {count for _, count in counts[:10]} == {often}
        assert {count for _, count in counts[10:]} == {seldom}


def test_frequent_words_are_the_most_frequent_after_the_dots(bundled: LoadedModel) -> None:
    (task,) = find_tasks(["fwe"])
    sample = task.make(Random(0), _room(bundled, 2000), 1)
    words = sample.document.split("\n\n")[-1].split()
    ranked = sorted(set(words), key=lambda word: -words.count(word))
    assert ranked[0] == "...." and tuple(ranked[1:4]) == sample.questions[0].expected
    assert len({words.count(word) for word in ranked[:5]}) == 5


@pytest.mark.parametrize("task", _named(DEMO))
def test_demo_tasks_ask_what_was_asked_for(bundled: LoadedModel, task: Task) -> None:
    sample = task.make(Random("demo"), _room(bundled, 1500), 2)
    assert len(sample.questions) == 2
    assert all(len(question.expected) == 1 for question in sample.questions)
    if task.name == "demo_chains":
        assert all("is the same as" in question.expected[0] for question in sample.questions)


def test_what_cannot_fit_is_refused(bundled: LoadedModel) -> None:
    for name, tokens, questions, message in (
        ("niah_multikey_1", 150, 1, "needs at least"),
        ("demo_chains", 300, 5, "cannot ask 5 questions"),
    ):
        with pytest.raises(InvalidSpec, match=message):
            find_tasks([name])[0].make(Random(0), _room(bundled, tokens), questions)


def test_a_haystack_can_be_brought_along(bundled: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("Once there was\na mill. It stood by a river!\n\nNobody came. ")
    (task,) = find_tasks(["niah_single_2"], Material(essay=read_haystack(path)))
    document = task.make(Random(0), _room(bundled, 600), 1).document
    assert "Once there was a mill. It stood by a river! Nobody came. Once there was" in document
    for content in (b" \n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(InvalidSpec, match="haystack"):
            read_haystack(path)


def _squad(passages: int) -> dict[str, object]:
    paragraphs = [
        {
            "context": f"The tower number {number} was built in the year {1500 + number}.",
            "qas": [
                {
                    "question": f"When was tower {number} built?",
                    "answers": [{"text": f"{1500 + number}"}, {"text": f"the year {1500 + number}"}],
                },
                {"question": "Who paid?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(passages)
    ]
    return {"data": [{"title": "Towers", "paragraphs": paragraphs}]}


def test_questions_can_be_brought_along(bundled: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "towers.json"
    path.write_text(json.dumps(_squad(60)))
    (task,) = find_tasks(["qa"], Material(passages=read_squad(path)))
    sample = task.make(Random(0), _room(bundled, 700), 3)
    for question in sample.questions:
        number = int(question.text.split()[3])
        assert question.expected == (f"{1500 + number}", f"the year {1500 + number}")
        assert f"tower number {number} " in sample.document
    with pytest.raises(InvalidSpec, match="ends before 9000 tokens"):
        task.make(Random(0), _room(bundled, 9000), 1)
    with pytest.raises(InvalidSpec, match="no 61 passages"):
        task.make(Random(0), _room(bundled, 9000), 61)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"data": 3}', '{"data": [{"paragraphs": [{"qas": []}]}]}', '{"data": []}']
)
def test_broken_question_data_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InvalidSpec, match="broken.json"):
        read_squad(path)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(InvalidSpec, match="'niah' is unknown") as refused:
        find_tasks(["demo_facts", "niah"])
    assert "niah_single_1" in refused.value.hint
    assert [task.name for task in find_tasks(["qa", "vt", "qa"])] == ["qa", "vt"]


def test_scores() -> None:
    assert score("all", ("123", "Abc"), "it is 123") == 0.5
    assert score("all", ("123", "Abc"), "aBC and 123") == 1.0
    assert score("part", ("in May", "May"), "It was may.") == 1.0
    assert score("part", ("May",), "June") == 0.0
    assert score("exact", ("The code is 1.",), "The code is 1.") == 1.0
    assert score("exact", ("The code is 1.",), "the code is 1.") == 0.0
