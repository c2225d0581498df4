"""Checkpoint soups: the average of a config's sources, of all or of those that help (arXiv 2203.05482).

Greedy: the sources are scored on the search documents and tried from best to worst; each joins the plain
average if the average with it scores strictly higher, as in the authors' code (the paper's listing also
takes equal scores). The select documents, which nothing was chosen by, then compare the soup with the best
single source. The config's base is no ingredient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evomerge.checkpoints.card import Row, SourceCard, model_card, read_license
from evomerge.checkpoints.source import Checkpoint
from evomerge.config import RunConfig
from evomerge.errors import CandidateError, FitnessError, RecipeError, SourceError
from evomerge.fitness.scoring import Interval, Resampled, plain_rules
from evomerge.fitness.selection import Gain
from evomerge.merging.stream import open_sources, write_model
from evomerge.plan import Plan
from evomerge.progress import Progress
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.records import Outcome
from evomerge.report.export import mergekit_yaml
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Job, Pool

Kind = Literal["uniform", "greedy"]


@dataclass(frozen=True, slots=True)
class Step:
    """One source that the greedy soup tried.

    Attributes:
        source: Its name.
        alone: Its own score on the search documents; None if it cannot be scored.
        score: Score there of the average with it; None if that cannot be scored or was not tried.
        kept: Whether it is in the soup from here on.
        reason: Why there is no score; empty where there is one.
    """

    source: str
    alone: float | None
    score: float | None
    kept: bool
    reason: str = ""

    def __str__(self) -> str:
        verdict = "added" if self.kept else "left out"
        if self.score is None:
            return f"{verdict} {self.source}: {self.reason}"
        return f"{verdict} {self.source}: alone {self.alone:.4f}, soup with it {self.score:.4f}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The soup beside the best single source, on the select documents.

    Attributes:
        soup: The soup's outcome.
        source: The outcome of the source with the best score on the search documents.
        scores: Score and 95 % bootstrap interval of the soup, then of the source.
        gain: How much better the soup is, paired by document; None where the soup is that source.
    """

    soup: Outcome
    source: Outcome
    scores: tuple[Interval, Interval]
    gain: Gain | None


@dataclass(frozen=True, slots=True)
class Soup:
    """A soup and how it came about.

    Attributes:
        kind: `uniform` or `greedy`.
        chosen: Names of its sources; of a greedy soup in the order in which they were added.
        recipe: Method `linear`, weight 1 for each of them, normalized.
        plan: The checked config it was made from.
        steps: What greedy tried, in order; the first is the best single source.
        select: Of a greedy soup, what it is worth.
    """

    kind: Kind
    chosen: tuple[str, ...]
    recipe: Recipe
    plan: Plan
    steps: tuple[Step, ...] = field(default=())
    select: Comparison | None = None

    @property
    def verdict(self) -> str:
        """One sentence: what was chosen."""
        if self.kind == "uniform":
            return f"uniform soup of all {len(self.chosen)} sources: {', '.join(self.chosen)}"
        chosen = f"greedy soup: {', '.join(self.chosen)} ({len(self.chosen)} of {len(self.steps)} sources)"
        alone = "; no average scores higher on the search documents" if len(self.chosen) == 1 else ""
        return chosen + alone

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        steps = [
            {
                "source": step.source,
                "alone": step.alone,
                "score": step.score,
                "kept": step.kept,
                "reason": step.reason,
            }
            for step in self.steps
        ]
        select = None
        if self.select is not None:
            found = self.select
            gain = found.gain
            select = {
                "soup": _scores(found.soup, found.scores[0]),
                "best_source": {"name": self.chosen[0], **_scores(found.source, found.scores[1])},
                "gain": gain and {"over": gain.over, **_interval(gain.interval), "shown": gain.shown},
            }
        return {
            "kind": self.kind,
            "chosen": list(self.chosen),
            "steps": steps,
            "select": select,
            "recipe": self.recipe.to_json(),
        }


def choose_soup(
    config: RunConfig,
    base_dir: Path,
    kind: Kind = "greedy",
    *,
    listener: Callable[[Progress], None] = lambda progress: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Soup:
    """Choose the sources of a soup.

    Only greedy scores anything: every source and all but one average on the whole of the search documents,
    one after another in this process, and two models on the select documents.

    Args:
        config: Its `sources.models` are the ingredients; `fitness`, `seed`, `space.dtype`, `space.tokenizer`
            and the threads, device and dtype of its workers count too.
        base_dir: What the config's paths are relative to.
        kind: `uniform`: all sources; `greedy`: those that help.
        listener: Called after each score.
        notice: Called with lines for people, one for each step of greedy.

    Raises:
        UserError: A source or a task does not work, or no source can be scored.
    """
    notice("reading sources and tasks")
    plan = Plan(config, base_dir)
    for warning in plan.warnings:
        notice(f"warning: {warning}")
    names = [ref.name for ref in config.sources.models]
    if kind == "uniform":
        return Soup(kind, tuple(names), _average(plan, names), plan)
    with _pool(plan) as pool:
        return _Greedy(plan, pool, listener, notice).run()


def write_soup(
    soup: Soup,
    target: Path,
    *,
    notice: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a soup as a model directory with recipe and model card; return the directory.

    Args:
        soup: What `choose_soup` returned.
        target: The directory to make.
        notice: Called with lines for people.
        progress: Called with bytes written and bytes in all.

    Raises:
        UserError: The target does not work, or a source changed meanwhile; there is no target then.
    """
    recipe = soup.recipe.located(soup.plan.base_dir)
    opened = open_sources(recipe)
    for ref in recipe.refs:
        if opened[ref.name].fingerprint != ref.fingerprint:
            raise SourceError(f"source {ref.name} ({ref.path}) changed meanwhile; restore it and start again")
    texts = {"recipe.yaml": recipe.to_yaml(), "README.md": _card(soup, target.name, recipe, opened)}
    mergekit = mergekit_yaml(recipe, opened)
    if mergekit is not None:
        texts["mergekit.yaml"] = mergekit
    try:
        return write_model(recipe, opened, target, texts=texts, progress=progress, notice=notice)
    except CandidateError as problem:
        raise RecipeError(f"{target}: {problem}") from None


class _Greedy:
    """Scores averages one after another, and keeps what helps."""

    def __init__(
        self, plan: Plan, pool: Pool, listener: Callable[[Progress], None], notice: Callable[[str], None]
    ) -> None:
        self._plan, self._pool, self._listener, self._notice = plan, pool, listener, notice
        self._phase, self._done, self._total, self._failures = "", 0, 0, 0
        self._best: float | None = None

    def run(self) -> Soup:
        """Return the soup."""
        names = [ref.name for ref in self._plan.config.sources.models]
        self._begin("sources", len(names))
        alone = {name: self._score([name], "search") for name in names}
        scores = {name: outcome.score for name, outcome in alone.items() if outcome.score is not None}
        if not scores:
            reason = alone[names[0]].reason
            raise FitnessError(f"no source can be scored; the first failure ({names[0]}): {reason}")
        ranked = sorted(scores, key=lambda name: -scores[name])  # stable: of equals the config's first
        chosen = ranked[:1]
        self._best = best = scores[chosen[0]]
        steps = [Step(chosen[0], best, best, kept=True)]
        self._notice(str(steps[0]))
        self._begin("soup", len(ranked) - 1)
        for name in ranked[1:]:
            tried = self._score([*chosen, name], "search")
            kept = tried.score is not None and tried.score > best
            if tried.score is not None and kept:
                chosen.append(name)
                self._best = best = tried.score
            steps.append(Step(name, scores[name], tried.score, kept, tried.reason))
            self._notice(str(steps[-1]))
        for name in names:
            if name not in scores:
                steps.append(Step(name, None, None, kept=False, reason=alone[name].reason))
                self._notice(str(steps[-1]))
        select = self._compare(chosen)
        return Soup("greedy", tuple(chosen), _average(self._plan, chosen), self._plan, tuple(steps), select)

    def _compare(self, chosen: Sequence[str]) -> Comparison:
        """Score the soup and its first source on the select documents."""
        compared = [chosen, chosen[:1]] if len(chosen) > 1 else [chosen]
        self._begin("select", len(compared))
        outcomes = [self._score(names, "select") for names in compared]
        for names, outcome in zip(compared, outcomes, strict=True):
            if outcome.score is None:
                raise FitnessError(
                    f"the average of {', '.join(names)} cannot be scored on the select documents: "
                    f"{outcome.reason}"
                )
        rules = self._plan.rules or plain_rules(outcomes[0].values)
        try:
            resampled = Resampled(rules, [o.values for o in outcomes], seed=self._plan.config.seed)
        except (KeyError, ValueError) as problem:
            raise FitnessError(
                f"fitness.function: soup and source got values of different documents ({problem}); return "
                "the same tasks and documents for every model"
            ) from None
        gain = Gain(chosen[0], resampled.gain(0, 1)) if len(chosen) > 1 else None
        return Comparison(
            outcomes[0], outcomes[-1], (resampled.score(0), resampled.score(len(outcomes) - 1)), gain
        )

    def _begin(self, phase: str, total: int) -> None:
        self._phase, self._done, self._total = phase, 0, total

    def _score(self, names: Sequence[str], documents: str) -> Outcome:
        job = Job(self._done, _average(self._plan, names).to_json(), documents, float("inf"))
        self._pool.submit(job)
        (outcome,) = self._pool.wait(float("inf"))
        self._done += 1
        self._failures += outcome.status != "ok"
        state = self._pool.state()
        self._listener(
            Progress(
                self._phase,
                self._done,
                self._total,
                self._best,
                outcome.score,
                self._failures,
                state.workers,
                state.deaths,
            )
        )
        return outcome


def _pool(plan: Plan) -> Pool:
    """Return one worker in this process that knows the ingredients only."""
    refs = _ingredients(plan)
    names = [ref.name for ref in refs]
    tokenizer = plan.config.space.tokenizer
    spec = plan.worker_spec(plan.config.workers.threads or os.cpu_count() or 1)
    changes = {
        "sources": tuple(refs),
        "reference": names[0],
        "tokenizer": tokenizer if tokenizer in names else names[0],
    }
    return InlinePool(spec.model_copy(update=changes))


def _ingredients(plan: Plan) -> list[SourceRef]:
    return [plan.refs[ref.name] for ref in plan.config.sources.models]


def _average(plan: Plan, names: Sequence[str]) -> Recipe:
    """Return the recipe of the plain average of some sources."""
    tokenizer = plan.config.space.tokenizer
    data = {
        "method": "linear",
        "sources": [plan.refs[name].model_dump(exclude_none=True) for name in names],
        "tokenizer": tokenizer if tokenizer in names else None,
        "dtype": plan.config.space.dtype,
    }
    return parse_recipe(data, "soup")


def _card(soup: Soup, name: str, recipe: Recipe, opened: dict[str, Checkpoint]) -> str:
    sources = [
        SourceCard(
            ref.name, ref.path, ref.revision, ref.fingerprint or "", read_license(opened[ref.name].path)
        )
        for ref in recipe.refs
    ]
    rows: list[Row] = []
    gain = soup.select.gain.interval if soup.select and soup.select.gain else None
    if soup.select is not None:
        names = (name, soup.chosen[0])
        outcomes = (soup.select.soup, soup.select.source)
        for model, outcome, interval in zip(names, outcomes, soup.select.scores, strict=True):
            tasks = {task: (found.metric, found.stderr) for task, found in outcome.tasks.items()}
            rows.append(Row(model, tasks, (interval.mean, interval.low, interval.high)))
    claimed = None
    if gain is not None and gain.low is not None and gain.high is not None:
        claimed = (gain.mean, gain.low, gain.high)
    return model_card(
        name=name,
        base_models=sources,
        method=recipe.method,
        recipe_yaml=recipe.to_yaml(),
        results=rows if gain is not None else rows[:1],
        gain=claimed,
        gain_over=f"{soup.chosen[0]}, the best single source on the search documents",
        warnings=[f"This is a {soup.verdict}."],
    )


def _scores(outcome: Outcome, interval: Interval) -> dict[str, Any]:
    return {
        "score": outcome.score,
        "stderr": outcome.stderr,
        "tasks": {name: {"metric": t.metric, "stderr": t.stderr} for name, t in outcome.tasks.items()},
        "low": interval.low,
        "high": interval.high,
    }


def _interval(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "level": interval.level}
