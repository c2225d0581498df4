"""Values per document beside a task's own metrics. They move where an accuracy stands still. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.errors import FitnessError

GOLD_LOGLIKELIHOOD = "gold_loglikelihood"
"""Log-likelihood of the right answer per byte of it, in nats; of the likeliest where several are right."""

OUTPUT_TOKENS = "output_tokens"
"""Length of the answer that is generated, in tokens; lower is better."""

LAYERS = "layers"
"""Decoder layers of the model; its time and key-value cache are proportional to them. Lower is better."""

SECONDS = "seconds"
"""Time in which the requests of the document set are answered, divided by its documents; lower is better.

It varies from one evaluation to the next, so equal recipes score differently."""

MEASURES = {GOLD_LOGLIKELIHOOD: True, OUTPUT_TOKENS: False, LAYERS: False, SECONDS: False}
"""Name to whether higher is better."""


def check_measure(where: str, name: str, task: Any) -> None:
    """Raise FitnessError unless a measure exists for an lm-eval task."""
    kind = task.OUTPUT_TYPE
    if name == OUTPUT_TOKENS and kind != "generate_until":
        raise FitnessError(f"{where}: {name} needs a task that generates text; this one is of type {kind}")
    if name == GOLD_LOGLIKELIHOOD and (kind == "loglikelihood_rolling" or not hasattr(task, "doc_to_choice")):
        raise FitnessError(f"{where}: {name} needs a task with right answers; this one is of type {kind}")


def gold_instances(task: Any, doc: Any, instances: Sequence[Any]) -> list[Any]:
    """Return those of a document's instances that ask for the log-likelihood of a right answer.

    Raises:
        FitnessError: The document names a right answer that is none of its choices.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return list(instances)
    choices = task.doc_to_choice(doc)
    named = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    found = []
    for gold in named if isinstance(named, list | tuple) else [named]:
        index = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if isinstance(index, str) and index.isdigit():
            index = int(index)
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise FitnessError(
                f"{GOLD_LOGLIKELIHOOD}: answer {gold!r:.40} is none of a document's {len(choices)} choices"
            )
        found.append(instances[index])
    return found


def gold_text(task: Any, doc: Any) -> str:
    """Return the right answer of a document that text is generated for, with the delimiter before it."""
    target = task.doc_to_target(doc)
    if isinstance(target, list | tuple):
        target = target[0]
    return f"{task.config.target_delimiter}{target}"


def per_byte(total: float, text: str) -> float:
    """Return a log-likelihood per byte of its text."""
    return total / max(1, len(text.encode()))
