"""Measures beside a task's metrics: their values by a plain forward, and what they do to the score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import FitnessError
from evomerge.fitness.harness import Harness
from evomerge.fitness.settings import FitnessSettings
from evomerge.fitness.tasks import TaskSet
from evomerge.records import DocumentSet
from tests.checkpoints.tiny import make_llama
from tests.fitness import tiny_tasks as tiny

SEARCH = DocumentSet("search")
COUNTS = {"search": 8, "select": 2, "test": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = make_llama(tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def task_set(folder: Path, *tasks: Any) -> TaskSet:
    data = {"tasks": tasks, "include_paths": [str(folder)], "documents": COUNTS}
    return TaskSet(FitnessSettings.model_validate(data), 7, folder)


@torch.inference_mode()
def likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + text)["input_ids"]])
    found = torch.log_softmax(model(ids).logits[0, start - 1 : -1], -1)
    return float(found.gather(1, ids[0, start:, None]).sum())


def documents(tasks: TaskSet, name: str) -> Iterator[Any]:
    docs = tasks.tasks[name].task.eval_docs
    return (docs[i] for i in tasks.documents(SEARCH)[name])


def test_the_right_answers_likelihood_is_that_of_a_plain_forward(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_choice(tmp_path, "choice")
    tiny.write_cloze(tmp_path, "cloze")
    tiny.write_generation(tmp_path, "answer")
    tasks = task_set(
        tmp_path, *({"name": n, "metric": "gold_loglikelihood"} for n in ("choice", "cloze", "answer"))
    )
    found = Harness.of_model(tasks, *llama).evaluate(SEARCH)
    right = {
        "choice": lambda doc: " " + doc["words"][doc["gold"]],
        "cloze": lambda doc: doc["answer"],
        "answer": lambda doc: " " + doc["answer"],
    }
    for name, text in right.items():
        expected = [
            likelihood(*llama, f"D: {doc['a']}+{doc['b']}\nA:", text(doc)) / len(text(doc))
            for doc in documents(tasks, name)
        ]
        assert found.values[name] == pytest.approx(expected, rel=1e-4)
        assert found.tasks[name].metric == pytest.approx(sum(expected) / 8, rel=1e-4)
        assert found.tasks[name].stderr is not None
    assert found.score == pytest.approx(sum(found.tasks[name].metric for name in right) / 3)


def test_measures_enter_the_score_by_their_weight_beside_the_metric(
    llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tiny.write_generation(tmp_path, "answer")
    plain = Harness.of_model(task_set(tmp_path, "answer"), *llama).evaluate(SEARCH)
    also = {"gold_loglikelihood": 0.5, "output_tokens": 0.001}
    tasks = task_set(tmp_path, {"name": "answer", "also": also})
    found = Harness.of_model(tasks, *llama).evaluate(SEARCH)
    assert found.values["answer"] == plain.values["answer"]
    metric = {name: score.metric for name, score in found.tasks.items()}
    expected = metric["answer"] + 0.5 * metric["answer:gold_loglikelihood"]
    expected -= 0.001 * metric["answer:output_tokens"]
    assert found.score == pytest.approx(expected / 1.501)
    assert 0 < metric["answer:output_tokens"] <= 12
    assert tasks.fingerprint != task_set(tmp_path, "answer").fingerprint


def test_several_right_answers_count_by_the_likeliest(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tiny.write_choice(
        tmp_path,
        "choice",
        doc_to_choice=["zero", "one", "two"],
        doc_to_target=[0, 2],
        metric_list=[tiny.metric("acc")],
    )
    tasks = task_set(tmp_path, {"name": "choice", "metric": "gold_loglikelihood"})
    found = Harness.of_model(tasks, *llama).evaluate(SEARCH)
    for doc, value in zip(documents(tasks, "choice"), found.values["choice"], strict=True):
        context = f"D: {doc['a']}+{doc['b']}\nA:"
        zero, two = (likelihood(*llama, context, word) / len(word) for word in (" zero", " two"))
        assert value == pytest.approx(max(zero, two), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "text", "metric": "gold_loglikelihood"}, "needs a task with right answers"),
        ({"name": "choice", "also": {"output_tokens": 1.0}}, "needs a task that generates text"),
        ({"name": "choice", "metric": "gold_loglikelihod"}, 'unknown metric "gold_loglikelihod"'),
    ],
)
def test_what_a_task_has_no_measure_for_is_refused(task: Any, message: str, tmp_path: Path) -> None:
    tiny.write_tasks(tmp_path)
    with pytest.raises(FitnessError, match=message):
        task_set(tmp_path, task)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "t", "also": {"output_token": 1.0}}, "did you mean"),
        ({"name": "t", "also": {"output_tokens": 0.0}}, "expected a weight above 0"),
        ({"name": "t", "metric": "output_tokens", "also": {"output_tokens": 1.0}}, "is the metric already"),
    ],
)
def test_settings_that_make_no_sense_are_refused(task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitnessSettings.model_validate({"tasks": [task]})


def test_layers_and_seconds_lower_the_score(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tiny.write_choice(tmp_path, "choice")
    alone = Harness.of_model(task_set(tmp_path, "choice"), *llama).evaluate(SEARCH)
    also = {"layers": 0.01, "seconds": 0.5}
    found = Harness.of_model(task_set(tmp_path, {"name": "choice", "also": also}), *llama).evaluate(SEARCH)
    assert found.values["choice"] == alone.values["choice"]
    assert found.values["choice:layers"] == (2.0,) * COUNTS["search"]
    (seconds,) = set(found.values["choice:seconds"])
    assert 0 < seconds < 60
    assert found.score == pytest.approx((alone.score - 0.01 * 2 - 0.5 * seconds) / 1.51)
