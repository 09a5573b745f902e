"""The harness on the bundled model: paired, the same for a seed, whole from its parts, in every protocol."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import families
import pytest

from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.demo.documents import make_document
from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.chat import Chat
from xkv_service.evaluation.harness import evaluate
from xkv_service.evaluation.methods.registry import make_method
from xkv_service.evaluation.plan import Plan
from xkv_service.evaluation.protocols import find_protocol, prefixes
from xkv_service.evaluation.rendering import Renderer
from xkv_service.evaluation.results import Results, from_json, merge
from xkv_service.evaluation.tasks.base import Question, Sample
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix
from xkv_service.prefilling.prefill import prefill


def _plan(**options: Any) -> Plan:
    given = {"tasks": ["demo_documents"], "methods": ["xkv:ratio=3"], "lengths": [400], "samples": 4}
    return Plan.create(**{**given, **options})


def _row(results: Results, method: str, task: str = "demo_documents") -> dict[str, Any]:
    (row,) = [row for row in results.rows() if (row["method"], row["task"]) == (method, task)]
    return row


def test_the_exact_cache_answers_and_crushed_factors_do_not(bundled: LoadedModel) -> None:
    plan = _plan(methods=["xkv:ratio=3", "xkv:group=1,ratio=18,index=none,sink=0"], per_document=2)
    results = evaluate(bundled, plan)
    full, good, bad = (_row(results, method) for method in plan.methods)
    assert (full["accuracy"], full["difference"], full["ratio"], full["n"]) == (1.0, 0.0, 1.0, 4)
    assert good["accuracy"] == 1.0 and 3.0 <= good["ratio"] < 3.1
    assert bad["accuracy"] < 0.5 and bad["difference"] == bad["accuracy"] - 1.0
    assert {row["documents"] for row in (full, good, bad)} == {2}
    assert full["bytes_full"] == full["bytes"] == full["tokens"] * 6144


@pytest.mark.parametrize("protocol", ["question-later", "question-inside", "five-turns", "many-requests"])
def test_every_protocol(bundled: LoadedModel, protocol: str) -> None:
    plan = _plan(protocol=protocol, samples=3, lengths=[900])
    results = evaluate(bundled, plan)
    full, xkv = (_row(results, method) for method in plan.methods)
    assert full["accuracy"] == 1.0
    assert xkv["accuracy"] >= 0.8
    if protocol == "five-turns":
        assert xkv["n"] == 5 and [turn["turn"] for turn in xkv["by_turn"]] == [1, 2, 3, 4, 5]
        assert sum(turn["accuracy"] for turn in xkv["by_turn"]) / 5 == pytest.approx(xkv["accuracy"])
    else:
        assert xkv["n"] == 3 and "by_turn" not in xkv


def test_a_question_inside_is_all_but_the_last_token(bundled: LoadedModel) -> None:
    renderer = Renderer(bundled.tokenizer)
    sample = Sample("A long document.", (Question("Why?", ("x",)), Question("How?", ("y",), "By")))
    later = list(prefixes(find_protocol("question-later"), renderer, sample))
    inside = list(prefixes(find_protocol("question-inside"), renderer, sample))
    assert len(later) == 1 and later[0].questions == sample.questions
    text = bundled.tokenizer.decode(inside[1].token_ids)
    assert text.startswith("<|begin|><|user|>A long document.\n\nHow?<|end|><|assistant|>")
    assert inside[1].token_ids == renderer.prompt(sample.document, [], "How?", "By")[:-1]
    assert [prefix.questions for prefix in inside] == [(question,) for question in sample.questions]


def test_tasks_after_ruler_are_answered_through_their_first_words(bundled: LoadedModel) -> None:
    plan = _plan(tasks=["niah_single_2", "niah_multikey_1"], lengths=[500], samples=2)
    results = evaluate(bundled, plan)
    assert _row(results, "full", "niah_single_2")["accuracy"] == 1.0
    mean = _row(results, "full", "average")
    assert mean["n"] == 4
    parts = [_row(results, "full", task.name)["accuracy"] for task in plan.tasks]
    assert mean["accuracy"] == pytest.approx(sum(parts) / 2)


def test_shards_merge_to_the_whole(bundled: LoadedModel, tmp_path: Path) -> None:
    plan = {"samples": 3, "lengths": [300], "methods": ["snapkv:ratio=2"]}
    whole = evaluate(bundled, _plan(**plan))
    parts = []
    for shard in ("1/2", "2/2"):
        path = tmp_path / "part.json"
        path.write_text(json.dumps(evaluate(bundled, _plan(**plan, shard=shard)).to_json(marks=True)))
        parts.append(from_json(json.loads(path.read_text())))
    assert merge(parts).rows() == whole.rows()
    assert merge([whole, evaluate(bundled, _plan(**plan, seed=1))]).rows()[0]["n"] == 6


def test_what_does_not_belong_together_is_not_merged(bundled: LoadedModel) -> None:
    one, other = (
        evaluate(bundled, _plan(samples=2)),
        evaluate(bundled, _plan(samples=1, methods=["full"], seed=1)),
    )
    with pytest.raises(InvalidSpec, match="has 2 documents"):
        merge([one, other])
    with pytest.raises(InvalidSpec, match="differ in protocol"):
        merge([one, Results({**one.about, "protocol": "five-turns"})])
    with pytest.raises(InvalidSpec, match="not the results"):
        from_json({"rows": []})


def test_a_ratio_out_of_reach_is_noted_and_the_rest_goes_on(bundled: LoadedModel) -> None:
    results = evaluate(bundled, _plan(methods=["xkv:ratio=200", "xkv:ratio=3"], samples=2))
    missed = _row(results, "xkv:ratio=200")
    assert missed["n"] == 0 and "cannot be reached" in missed["note"]
    assert _row(results, "xkv:ratio=3")["n"] == 2


def test_documents_do_not_depend_on_what_else_is_run(bundled: LoadedModel) -> None:
    alone = evaluate(bundled, _plan(samples=2))
    among = evaluate(
        bundled, _plan(tasks=["demo_facts", "demo_documents"], methods=["snapkv", "xkv:ratio=3"], samples=2)
    )
    assert _row(alone, "xkv:ratio=3") == _row(among, "xkv:ratio=3")


@pytest.mark.parametrize("text", ["full", "xkv:ratio=4,selector=sketch,budget=48", "snapkv:ratio=4"])
def test_a_confirmed_answer_is_the_one_decoded(bundled: LoadedModel, text: str) -> None:
    """One pass over a known answer says what decoding token by token says, selection and eviction too."""
    document = make_document(Random("confirmed"), 900)
    ids = render_prefix(bundled.tokenizer, document.text)
    prepared = make_method(text).prepare(bundled.model, prefill(bundled.model, ids))
    with enable_xkv(bundled.model):
        for question in document.questions[:3]:
            said = []
            for expected in (None, question.answer):
                chat = Chat(
                    bundled.model, bundled.tokenizer, prepared.cache(), ids, document.text,
                    max_new_tokens=200, fresh=prepared.cache,
                )  # fmt: skip
                said.append(chat.ask(question.question, expected).text)
            assert said[0] == said[1]


def test_a_model_without_template_is_asked_in_plain_text(tiny_model: Path) -> None:
    loaded = load_model(tiny_model, device="cpu")
    loaded.tokenizer.chat_template = None
    results = evaluate(
        loaded, _plan(tasks=["niah_single_1"], lengths=[900], samples=1, methods=["xkv:ratio=2"])
    )
    assert results.about["template"] == "raw"
    assert _row(results, "full", "niah_single_1")["n"] == 1


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_models_with_windows_and_states_hold_conversations(tiny_model: Path, family: str) -> None:
    """Their caches cannot be cropped, so a chat that must go back starts from a fresh one."""
    loaded = load_model(tiny_model, device="cpu")
    model = families.tiny_model(family, vocab_size=260, max_position_embeddings=8192)
    plan = _plan(
        tasks=["niah_single_1"],
        methods=["xkv:group=2,ratio=2", "snapkv:ratio=2"],
        lengths=[1300],
        protocol="five-turns",
        samples=5,
    )
    results = evaluate(LoadedModel(model, loaded.tokenizer, loaded.identity), plan)
    assert [row["n"] for row in results.rows()] == [5, 5, 5]


def test_lengths_beyond_the_window_are_refused(bundled: LoadedModel) -> None:
    with pytest.raises(InvalidSpec, match="beyond the model's window of 16384"):
        evaluate(bundled, _plan(lengths=[500, 16385]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"per_document": 0}, "per_document=0"),
        ({"lengths": []}, "no lengths"),
        ({"tasks": []}, "no tasks"),
        ({"lengths": [0]}, "length 0"),
        ({"protocol": "later"}, "'later' is unknown"),
        ({"shard": "0/2"}, "'0/2'"),
        ({"shard": "5/9"}, "no documents"),
        ({"tasks": ["fwe"], "protocol": "five-turns"}, "fwe has 1 question"),
        ({"haystack": Path("nowhere.txt")}, "nowhere.txt"),
        ({"qa_data": Path("nowhere.json")}, "nowhere.json"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        _plan(**options)
