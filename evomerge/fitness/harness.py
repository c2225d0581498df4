"""The warm evaluator: lm-eval's requests are built and tokenised once, each candidate only forwards.

The numbers are those that the stock `lm_eval` command prints for the exported model: requests, filters,
metrics and aggregation are lm-eval's own; only the forward passes are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from evomerge.errors import CandidateError
from evomerge.fitness.engine import Engine, TokenRequest, is_plain_greedy
from evomerge.fitness.scoring import aggregate, combine, combined_error, standard_error
from evomerge.fitness.tasks import FEWSHOT_SEED, LoadedTask, TaskSet, lm_eval_quiet
from evomerge.records import DocumentSet, TaskScore, Value
from evomerge.seeding import derive


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's result on one document set.

    Attributes:
        score: Weighted mean over tasks, higher is better.
        stderr: Its standard error; None if a task's is unknown.
        tasks: Task name to metric and standard error.
        values: Task name to one value per document, in the order of the document set.
        counts: `requests`, `tokens` (distinct positions forwarded) and `padded_tokens`.
    """

    score: float
    stderr: float | None
    tasks: dict[str, TaskScore]
    values: dict[str, tuple[Value, ...]]
    counts: dict[str, float]


@dataclass(slots=True)
class _Prepared:
    """One document's requests: lm-eval's instances and their tokens, made once."""

    doc: Any
    instances: list[Any]
    tokens: list[list[TokenRequest]] = field(default_factory=list)


class Harness:
    """Scores whatever weights the model holds.

    Args:
        tasks: The run's tasks.
        model: The resident transformers model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, tasks: TaskSet, model: Any, tokenizer: Any) -> None:
        self._tasks = tasks
        self.engine = Engine(model, tokenizer, tasks.settings.batch_tokens)
        self._splits: dict[tuple[str, str], dict[int, _Prepared]] = {}

    def rebind(self, model: Any) -> None:
        """Score another model object from now on; requests and tokens stay."""
        self.engine.rebind(model)

    def prepare(self, split: str) -> None:
        """Build and tokenise the requests of a split now rather than at its first use."""
        for loaded in self._tasks.tasks.values():
            self._prepared(loaded, split)

    def evaluate(self, documents: DocumentSet) -> Evaluation:
        """Score the model.

        Raises:
            CandidateError: A log-likelihood or score is not finite.
        """
        chosen = self._tasks.documents(documents)
        work: dict[str, list[_Prepared]] = {}
        for name, loaded in self._tasks.tasks.items():
            prepared = self._prepared(loaded, documents.split)
            work[name] = [prepared[i] for i in chosen[name]]
        self.engine.reset_counts()
        self._answer([item for items in work.values() for item in items])
        values: dict[str, tuple[Value, ...]] = {}
        with lm_eval_quiet():
            for name, loaded in self._tasks.tasks.items():
                values[name] = _values(loaded, work[name])
        rules = self._tasks.rules
        metrics = {name: aggregate(rules[name], values[name]) for name in rules}
        errors = {name: standard_error(rules[name], values[name]) for name in rules}
        score = float(combine(rules, metrics)[0])
        if not math.isfinite(score):
            raise CandidateError(f"score on {documents.key} is {score}")
        return Evaluation(
            score=score,
            stderr=combined_error(rules, errors),
            tasks={name: TaskScore(float(metrics[name][0]), errors[name]) for name in rules},
            values=values,
            counts=dict(self.engine.counts),
        )

    def _prepared(self, loaded: LoadedTask, split: str) -> dict[int, _Prepared]:
        """Return the requests of a split by document, built as stock lm-eval builds them for that split."""
        key = (loaded.name, split)
        if key not in self._splits:
            settings, lm, task = self._tasks.settings, self.engine.lm, loaded.task
            ids = loaded.ids[split]
            templated = bool(settings.chat_template)
            with lm_eval_quiet():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(
                    samples=list(ids),
                    rank=0,
                    world_size=1,
                    system_instruction=settings.system_prompt,
                    apply_chat_template=templated,
                    fewshot_as_multiturn=settings.fewshot_as_multiturn,
                    chat_template=lm.apply_chat_template if templated else None,
                    tokenizer_name=lm.tokenizer_name if templated else "",
                )
                # An instance's doc_id is its position in `samples`, not in the task's documents.
                built = {i: _Prepared(task.eval_docs[i], []) for i in ids}
                for instance in task.instances:
                    built[ids[instance.doc_id]].instances.append(instance)
            for item in built.values():
                item.instances.sort(key=lambda instance: instance.idx)
                item.tokens = [self.engine.encode(instance) for instance in item.instances]
            self._splits[key] = built
        return self._splits[key]

    def _answer(self, items: Sequence[_Prepared]) -> None:
        """Fill in the responses of every instance."""
        likelihoods: list[tuple[Any, list[TokenRequest]]] = []
        greedy: list[tuple[Any, TokenRequest]] = []
        other: list[Any] = []
        for item in items:
            for instance, tokens in zip(item.instances, item.tokens, strict=True):
                instance.resps, instance.filtered_resps = [], {}
                if instance.request_type != "generate_until":
                    likelihoods.append((instance, tokens))
                elif self.engine.greedy_is_plain and is_plain_greedy(instance.args[1]):
                    greedy.append((instance, tokens[0]))
                else:
                    other.append(instance)
        flat = [request for _, requests in likelihoods for request in requests]
        scored = iter(self.engine.loglikelihoods(flat))
        for instance, requests in likelihoods:
            parts = [next(scored) for _ in requests]
            total = sum(part for part, _ in parts)
            rolling = instance.request_type == "loglikelihood_rolling"
            answer = total if rolling else (total, parts[0][1])
            instance.resps = [answer] * instance.repeats
        for (instance, _), text in zip(greedy, self.engine.generate([r for _, r in greedy]), strict=True):
            instance.resps = [text] * instance.repeats
        if other:
            copies = [instance for instance in other for _ in range(instance.repeats)]
            torch.manual_seed(derive(0, "generation"))
            with lm_eval_quiet():
                texts = self.engine.lm.generate_until(copies, disable_tqdm=True)
            for instance, text in zip(copies, texts, strict=True):
                instance.resps.append(text)


def _values(loaded: LoadedTask, items: Sequence[_Prepared]) -> tuple[Value, ...]:
    """Return one value per document, through the task's own filters and metrics."""
    task = loaded.task
    task._instances = [instance for item in items for instance in item.instances]
    task.apply_filters()
    values: list[Value] = []
    for item in items:
        answers = [instance.filtered_resps[loaded.filter] for instance in item.instances]
        results: Mapping[str, Any] = task.process_results(item.doc, answers)
        value = results[loaded.rule.metric]
        values.append((float(value[0]), float(value[1])) if isinstance(value, tuple) else float(value))
    return tuple(values)
