"""A Python callable as fitness.

The callable is `f(model, tokenizer, request) -> result`, run inside the worker, where `model` is the merged
transformers model and `request` a `Request`. The result is a number (higher is better), a list of one number
per document (their mean is the score), which makes intervals possible, or a mapping of names to either (the
mean over names is the score).

It should score different documents for `request.split` = `search`, `select` and `test`, and the same ones
whenever the request is equal.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.harness import Evaluation
from evomerge.fitness.scoring import aggregate, combine, combined_error, plain_rules, standard_error
from evomerge.recipe import Recipe
from evomerge.records import DocumentSet, TaskScore, Value


@dataclass(frozen=True, slots=True)
class Request:
    """What a fitness callable is asked to score.

    Attributes:
        split: `search`, `select` or `test`.
        seed: The run's seed.
        recipe: The recipe whose model it is given.
    """

    split: str
    seed: int
    recipe: Recipe


def load_function(spec: str, base_dir: Path) -> Callable[..., Any]:
    """Return the callable that `module:name` or `file.py:name` names.

    Raises:
        FitnessError: There is none.
    """
    module_name, _, name = spec.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = (base_dir / module_name).resolve()
            found = importlib.util.spec_from_file_location(f"evomerge_fitness_{path.stem}", path)
            if found is None or found.loader is None or not path.is_file():
                raise FitnessError(f"fitness.function: {spec}: no such file ({path})")
            module = importlib.util.module_from_spec(found)
            sys.modules[module.__name__] = module
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, name)
    except FitnessError:
        raise
    except Exception as problem:  # whatever the user's module raises
        text = (str(problem).splitlines() or [""])[0]
        raise FitnessError(f"fitness.function: {spec}: {type(problem).__name__}: {text}") from problem
    if not callable(function):
        raise FitnessError(f"fitness.function: {spec}: expected a callable, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def evaluate_function(
    function: Callable[..., Any],
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    documents: DocumentSet,
    seed: int,
) -> Evaluation:
    """Call the callable and check what it returns.

    Raises:
        CandidateError: A number is not finite.
        FitnessError: The result has another form.
    """
    result = function(model, tokenizer, Request(documents.split, seed, recipe))
    table = result if isinstance(result, Mapping) else {"score": result}
    if not table:
        raise FitnessError("fitness.function: returned an empty mapping")
    values: dict[str, tuple[Value, ...]] = {
        str(name): _numbers(str(name), value) for name, value in table.items()
    }
    rules = plain_rules(values)
    metrics = {name: aggregate(rules[name], values[name]) for name in rules}
    errors = {name: standard_error(rules[name], values[name]) for name in rules}
    score = float(combine(rules, metrics))
    if not math.isfinite(score):
        raise CandidateError(f"score is {score}")
    return Evaluation(
        score=score,
        stderr=combined_error(rules, errors),
        tasks={name: TaskScore(metrics[name], errors[name]) for name in rules},
        values=values,
        counts={},
    )


def _numbers(name: str, value: Any) -> tuple[Value, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    numbers: list[Value] = []
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, Real):
            raise FitnessError(
                f"fitness.function: {name}: expected numbers, got {type(item).__name__} {item!r}"
            )
        number = float(item)
        if not math.isfinite(number):
            raise CandidateError(f"{name} is {number}")
        numbers.append(number)
    if not numbers:
        raise FitnessError(f"fitness.function: {name}: expected at least one number, got an empty list")
    return tuple(numbers)
