"""The warm evaluator: lm-eval's requests are built and tokenised once, each candidate only forwards.

The numbers are those that the stock `lm_eval` command prints for the exported model: requests, filters,
metrics and aggregation are lm-eval's own; only the forward passes are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import CandidateError, FitnessError
from evomerge.fitness.batches import Plan
from evomerge.fitness.contract import ScoringEngine
from evomerge.fitness.encoding import TokenRequest
from evomerge.fitness.engine import Engine
from evomerge.fitness.greedy import is_plain_greedy
from evomerge.fitness.measures import (
    GOLD_LOGLIKELIHOOD,
    LAYERS,
    OUTPUT_TOKENS,
    SECONDS,
    gold_instances,
    gold_text,
    per_byte,
)
from evomerge.fitness.racing import Race, standing
from evomerge.fitness.scoring import aggregate, combine, combined_error, standard_error
from evomerge.fitness.tasks import FEWSHOT_SEED, LoadedTask, TaskSet, lm_eval_quiet
from evomerge.records import DocumentSet, TaskScore, Value

KEPT_SETS = 12
"""Document sets whose batches are kept: the splits, the present draw, and the rungs of a race."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's result on one document set.

    Attributes:
        score: Weighted mean over tasks, higher is better.
        stderr: Its standard error; None if a task's is unknown.
        tasks: Task name to metric and standard error.
        values: Task name to one value per document, in the order of the document set.
        counts: `requests`; `tokens` forwarded, each distinct beginning once; `padded_tokens`, with padding;
            `unshared_tokens`, what forwarding each request by itself would take; `generated` tokens;
            `truncated` requests, whose beginning the model cannot read; `documents` scored, and
            `skipped_documents` that a lost race left out.
        stopped: Whether it lost a race; the score is then an estimate, and there are no values.
    """

    score: float
    stderr: float | None
    tasks: dict[str, TaskScore]
    values: dict[str, tuple[Value, ...]]
    counts: dict[str, float]
    stopped: bool = False


@dataclass(slots=True)
class _Prepared:
    """One document's requests, made once.

    Attributes:
        doc: The document.
        instances: lm-eval's.
        tokens: Their rows.
        gold: Where text is generated and the right answer's log-likelihood is measured: that answer.
        gold_row: Its row.
        gold_total: Its log-likelihood under the present model.
    """

    doc: Any
    instances: list[Any]
    tokens: list[list[TokenRequest]] = field(default_factory=list)
    gold: str = ""
    gold_row: TokenRequest | None = None
    gold_total: float = 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """What is the same for every candidate on one document set.

    Attributes:
        items: Task name to its documents.
        likelihoods: Instances that ask for log-likelihoods, and how many rows each has.
        plan: The batches of these rows.
        golds: Documents whose right answer is scored beside what is generated; their rows are the last ones.
        generations: Instances that ask for text, and their rows.
        truncated: Requests whose beginning is left out.
    """

    items: dict[str, list[_Prepared]]
    likelihoods: list[tuple[Any, int]]
    plan: Plan
    golds: list[_Prepared]
    generations: list[tuple[Any, TokenRequest]]
    truncated: int


class Harness:
    """Scores whatever weights the model holds.

    Args:
        tasks: The run's tasks.
        engine: What answers their requests.
    """

    def __init__(self, tasks: TaskSet, engine: ScoringEngine) -> None:
        self._tasks = tasks
        self.engine = engine
        self._splits: dict[tuple[str, str], dict[int, _Prepared]] = {}
        self._work: dict[tuple[DocumentSet, int], _Work] = {}
        self._seconds = 0.0

    @classmethod
    def of_model(cls, tasks: TaskSet, model: Any, tokenizer: Any) -> Harness:
        """Return one that scores a transformers model as the tasks' settings say."""
        settings = tasks.settings
        return cls(
            tasks, Engine(model, tokenizer, settings.batch_tokens, share_prefixes=settings.share_prefixes)
        )

    def prepare(self, split: str) -> None:
        """Build and tokenise the requests of a split now rather than at its first use."""
        for loaded in self._tasks.tasks.values():
            self._prepared(loaded, split)

    def evaluate(self, documents: DocumentSet, race: Race | None = None) -> Evaluation:
        """Score the model.

        Args:
            documents: What it is scored on.
            race: Stop as soon as this race is lost; None: score all documents.

        Raises:
            CandidateError: A log-likelihood or score is not finite.
        """
        self.engine.reset_counts()
        if race is None:
            work = self._prepared_work(documents)
            return self._evaluation(documents, self._scored(work), work.truncated)
        if documents.split != "search":
            raise ValueError(f"a race on {documents.key} documents; only search documents are raced on")
        rules, truncated = self._tasks.rules, 0
        rungs = self._tasks.rungs(documents, race.rungs)
        found: dict[str, dict[int, Value]] = {name: {} for name in rules}
        for number, rung in enumerate(rungs):
            work = self._prepared_work(documents, rung, number)
            truncated += work.truncated
            for name, values in self._scored(work).items():
                found[name].update(zip(rung[self._tasks.task_of(name)], values, strict=True))
            if number == len(rungs) - 1:
                break
            ids = {name: list(values) for name, values in found.items()}
            now = standing(race, rules, ids, {name: list(values.values()) for name, values in found.items()})
            if now.hopeless:
                counts = self._counts(documents, sum(len(ids[name]) for name in self._tasks.tasks), truncated)
                return Evaluation(now.score, now.stderr, {}, {}, counts, stopped=True)
        ordered = {name: tuple(value for _, value in sorted(own.items())) for name, own in found.items()}
        return self._evaluation(documents, ordered, truncated)

    def _scored(self, work: _Work) -> dict[str, tuple[Value, ...]]:
        """Return the values of a set's documents under the present model."""
        began = time.perf_counter()
        self._answer(work)
        self._seconds = (time.perf_counter() - began) / sum(map(len, work.items.values()))
        values: dict[str, tuple[Value, ...]] = {}
        with lm_eval_quiet():
            for name, loaded in self._tasks.tasks.items():
                values |= self._values(loaded, work.items[name])
        return values

    def _evaluation(
        self, documents: DocumentSet, values: dict[str, tuple[Value, ...]], truncated: int
    ) -> Evaluation:
        rules = self._tasks.rules
        metrics = {name: aggregate(rules[name], values[name]) for name in rules}
        errors = {name: standard_error(rules[name], values[name]) for name in rules}
        score = float(combine(rules, metrics))
        if not math.isfinite(score):
            raise CandidateError(f"score on {documents.key} is {score}")
        return Evaluation(
            score=score,
            stderr=combined_error(rules, errors),
            tasks={name: TaskScore(metrics[name], errors[name]) for name in rules},
            values=values,
            counts=self._counts(documents, sum(len(values[name]) for name in self._tasks.tasks), truncated),
        )

    def _counts(self, documents: DocumentSet, scored: int, truncated: int) -> dict[str, float]:
        whole = sum(map(len, self._tasks.documents(documents).values()))
        return {
            **self.engine.counts,
            "truncated": float(truncated),
            "documents": float(scored),
            "skipped_documents": float(whole - scored),
        }

    def _prepared_work(
        self, documents: DocumentSet, rung: Mapping[str, Sequence[int]] | None = None, number: int = -1
    ) -> _Work:
        """Return the work of a document set or of one rung of a race, kept for those used last."""
        work = self._work.pop((documents, number), None)
        if work is None:
            chosen = self._tasks.documents(documents)
            items = {}
            for name, loaded in self._tasks.tasks.items():
                prepared = self._prepared(loaded, documents.split)
                ids = chosen[name]
                items[name] = [prepared[i] for i in (ids if rung is None else [ids[k] for k in rung[name]])]
            pairs = [
                (instance, tokens)
                for prepared_items in items.values()
                for item in prepared_items
                for instance, tokens in zip(item.instances, item.tokens, strict=True)
            ]
            likelihoods = [pair for pair in pairs if pair[0].request_type != "generate_until"]
            golds = [item for own in items.values() for item in own if item.gold_row is not None]
            rows = [row for _, tokens in likelihoods for row in tokens]
            rows += [item.gold_row for item in golds if item.gold_row is not None]
            work = _Work(
                items=items,
                likelihoods=[(instance, len(tokens)) for instance, tokens in likelihoods],
                plan=self.engine.plan(rows),
                golds=golds,
                generations=[
                    (instance, tokens[0])
                    for instance, tokens in pairs
                    if instance.request_type == "generate_until"
                ],
                truncated=sum(any(row.cut for row in tokens) for _, tokens in pairs),
            )
        self._work[documents, number] = work
        while len(self._work) > KEPT_SETS:
            del self._work[next(iter(self._work))]
        return work

    def _prepared(self, loaded: LoadedTask, split: str) -> dict[int, _Prepared]:
        """Return the requests of a split by document, built as stock lm-eval builds them for that split."""
        key = (loaded.name, split)
        if key not in self._splits:
            settings, lm, task = self._tasks.settings, self.engine.lm, loaded.task
            ids = loaded.ids[split]
            templated = settings.chat_template
            turns = settings.fewshot_as_multiturn
            multiturn = templated if turns is None else turns
            with lm_eval_quiet():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(
                    samples=dict.fromkeys(ids),  # `in` a list would be quadratic
                    rank=0,
                    world_size=1,
                    system_instruction=settings.system_prompt,
                    apply_chat_template=templated,
                    fewshot_as_multiturn=multiturn,
                    chat_template=lm.apply_chat_template if templated else None,
                    tokenizer_name=lm.tokenizer_name if templated else "",
                )
                # An instance's doc_id is its position in `samples`, not in the task's documents.
                docs = task.eval_docs  # a property that processes all documents anew at each access
                built = {i: _Prepared(docs[i], []) for i in ids}
                for instance in task.instances:
                    built[ids[instance.doc_id]].instances.append(instance)
            for item in built.values():
                item.instances.sort(key=lambda instance: instance.idx)
                item.tokens = [self.engine.encode(instance) for instance in item.instances]
                if task.OUTPUT_TYPE == "generate_until" and _measures(loaded, GOLD_LOGLIKELIHOOD):
                    item.gold = gold_text(task, item.doc)
                    item.gold_row = self.engine.encode_pair(item.instances[0].args[0], item.gold)
            self._splits[key] = built
        return self._splits[key]

    def _answer(self, work: _Work) -> None:
        """Fill in the responses of every instance."""
        scored = iter(self.engine.loglikelihoods(work.plan))
        for instance, rows in work.likelihoods:
            parts = [next(scored) for _ in range(rows)]
            total = sum(part for part, _ in parts)
            rolling = instance.request_type == "loglikelihood_rolling"
            _respond(instance, total if rolling else (total, parts[0][1]))
        for item in work.golds:
            item.gold_total, _ = next(scored)
        greedy: list[tuple[Any, TokenRequest]] = []
        other: list[tuple[Any, TokenRequest]] = []
        for instance, request in work.generations:
            plain = self.engine.greedy_is_plain and is_plain_greedy(instance.args[1])
            (greedy if plain else other).append((instance, request))
        texts = self.engine.generate([request for _, request in greedy])
        for (instance, _), text in zip(greedy, texts, strict=True):
            _respond(instance, text)
        if other:
            self.engine.check_finite(other[0][1])
            copies = [instance for instance, _ in other for _ in range(instance.repeats)]
            for instance, _ in other:
                instance.resps, instance.filtered_resps = [], {}
            for instance, text in zip(copies, self.engine.generate_as_stock(copies), strict=True):
                instance.resps.append(text)

    def _values(self, loaded: LoadedTask, items: Sequence[_Prepared]) -> dict[str, tuple[Value, ...]]:
        """Return one value per document for the task's metric and each measure beside it."""
        values: dict[str, tuple[Value, ...]] = {}
        for key, rule in {loaded.name: loaded.rule, **loaded.measures}.items():
            if rule.metric == GOLD_LOGLIKELIHOOD:
                values[key] = tuple(_gold(loaded.task, item) for item in items)
            elif rule.metric == OUTPUT_TOKENS:
                values[key] = tuple(self._output_tokens(item) for item in items)
            elif rule.metric == LAYERS:
                values[key] = (float(self.engine.layers),) * len(items)
            elif rule.metric == SECONDS:
                values[key] = (self._seconds,) * len(items)
            else:
                values[key] = _metric_values(loaded, items)
        return values

    def _output_tokens(self, item: _Prepared) -> float:
        texts = [text for instance in item.instances for text in instance.resps]
        return sum(map(self.engine.count_tokens, texts)) / len(texts)


def _respond(instance: Any, answer: Any) -> None:
    """Give an instance its answer, the same for each repeat."""
    instance.resps, instance.filtered_resps = [answer] * instance.repeats, {}


def _measures(loaded: LoadedTask, name: str) -> bool:
    return any(rule.metric == name for rule in (loaded.rule, *loaded.measures.values()))


def _gold(task: Any, item: _Prepared) -> float:
    """Return the log-likelihood of a document's right answer per byte."""
    if item.gold_row is not None:
        return per_byte(item.gold_total, item.gold)
    chosen = gold_instances(task, item.doc, item.instances)
    return max(per_byte(instance.resps[0][0], instance.args[1]) for instance in chosen)


def _metric_values(loaded: LoadedTask, items: Sequence[_Prepared]) -> tuple[Value, ...]:
    """Return one value per document, through the task's own filters and metrics."""
    task, metric = loaded.task, loaded.rule.metric
    task._instances = [instance for item in items for instance in item.instances]
    task.apply_filters()
    values: list[Value] = []
    for item in items:
        answers = [instance.filtered_resps[loaded.filter] for instance in item.instances]
        results: Mapping[str, Any] = task.process_results(item.doc, answers)
        try:
            value = results[metric]
            values.append((float(value[0]), float(value[1])) if isinstance(value, tuple) else float(value))
        except (KeyError, TypeError, ValueError):
            raise FitnessError(
                f"fitness.tasks.{loaded.name}.metric: {metric}: expected a number for every document, got "
                f"{results.get(metric, 'none')!r:.80}"
            ) from None
    return tuple(values)
