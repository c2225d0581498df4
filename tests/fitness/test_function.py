"""A Python callable as fitness: finding it, and what it may return."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.function import Request, evaluate_function, load_function
from evomerge.fitness.harness import Evaluation
from evomerge.recipe import Recipe, parse_recipe
from evomerge.records import DocumentSet

RECIPE = parse_recipe({"method": "linear", "sources": [{"name": "a", "path": "a"}]}, "recipe")


def evaluate(function: Callable[..., Any]) -> Evaluation:
    return evaluate_function(function, "model", "tokenizer", RECIPE, DocumentSet("select"), 5)


def returning(result: Any) -> Evaluation:
    return evaluate(lambda model, tokenizer, request: result)


def test_it_is_given_the_model_the_tokenizer_and_what_to_score() -> None:
    seen: list[Any] = []

    def function(model: Any, tokenizer: Any, request: Request) -> float:
        seen.extend([model, tokenizer, request])
        return 1.0

    evaluate(function)
    assert seen == ["model", "tokenizer", Request("select", 5, RECIPE)]
    assert isinstance(seen[2].recipe, Recipe)


@pytest.mark.parametrize(
    "number",
    [0.5, 1, -3, np.float32(0.5), np.float64(2), np.int64(3), Fraction(1, 2), np.array(0.5)],
    ids=repr,
)
def test_a_number_is_the_score(number: Any) -> None:
    evaluation = returning(number)
    assert evaluation.score == float(number)
    assert type(evaluation.score) is float
    assert evaluation.values == {"score": (float(number),)}
    assert evaluation.stderr is None


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_numbers_per_document_give_their_mean_and_its_error(kind: Callable[[Any], Any]) -> None:
    evaluation = returning(kind([0.0, 1.0, 1.0, 1.0]))
    assert evaluation.score == 0.75
    assert evaluation.stderr == pytest.approx(0.25)
    assert evaluation.values == {"score": (0.0, 1.0, 1.0, 1.0)}


def test_a_mapping_is_scored_by_the_mean_over_its_names() -> None:
    evaluation = returning({"a": [0, 1], "b": np.float32(1.0), "c": (0.0, 0.0, 0.3)})
    assert evaluation.score == pytest.approx((0.5 + 1 + 0.1) / 3)
    assert evaluation.tasks["a"].metric == 0.5
    assert evaluation.tasks["a"].stderr == pytest.approx(0.5)
    assert evaluation.tasks["b"].stderr is None
    assert evaluation.stderr is None
    assert {name: len(values) for name, values in evaluation.values.items()} == {"a": 2, "b": 1, "c": 3}


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, np.float32("nan"), [1.0, math.nan], {"a": math.inf}], ids=repr
)
def test_a_number_that_is_not_finite_makes_the_candidate_invalid(number: Any) -> None:
    with pytest.raises(CandidateError, match=r"is -?(nan|inf)"):
        returning(number)


def test_numbers_whose_mean_is_not_finite_make_the_candidate_invalid() -> None:
    with np.errstate(over="ignore"), pytest.raises(CandidateError, match="score is inf"):
        returning([1e308, 1e308])


@pytest.mark.parametrize(
    "result",
    [
        *(None, "0.5", b"1", True, np.True_, 1j, object, {1.0}, {"a": None}, {"a": True}),
        *([True], ["1"], [[1.0]], [None], np.array(["1.5"]), np.zeros((2, 2)), np.str_("1.5")),
        *(torch.tensor(1.0), {"a": {"b": 1.0}}),
    ],
    ids=repr,
)
def test_anything_else_is_an_error_that_says_what_came(result: Any) -> None:
    with pytest.raises(FitnessError, match=r"fitness.function: \w+: expected numbers, got \w+"):
        returning(result)


@pytest.mark.parametrize("result", [{}, [], (), np.zeros(0), {"a": []}], ids=repr)
def test_nothing_is_an_error(result: Any) -> None:
    with pytest.raises(FitnessError, match=r"fitness.function: .*empty"):
        returning(result)


def test_what_it_raises_is_left_to_the_worker() -> None:
    def function(*_: Any) -> float:
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError, match="oops"):
        evaluate(function)


# Finding it


def test_it_is_found_in_a_file_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "my score.py").write_text("def score(model, tokenizer, request):\n    return 2\n")
    assert load_function("my score.py:score", tmp_path)(None, None, None) == 2


def test_it_is_found_in_an_installed_module() -> None:
    assert load_function("math:hypot", Path())(3, 4) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass", "AttributeError: module 'evomerge_fitness_mine' has no attribute 'score'"),
        ("score = 3", "expected a callable, got int"),
        ("def score(:", r"SyntaxError: .*"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('one\\ntwo')", "ValueError: one$"),
    ],
)
def test_a_file_without_a_callable_of_that_name_is_an_error_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(FitnessError, match=rf"^fitness.function: mine.py:score: {message}") as caught:
        load_function("mine.py:score", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere.py:score", "no.such.module:score", "math:no_such_name"])
def test_a_file_module_or_name_that_is_missing_is_an_error(spec: str, tmp_path: Path) -> None:
    with pytest.raises(FitnessError, match=r"fitness.function: "):
        load_function(spec, tmp_path)
