"""Runs with made-up but plausible candidates and outcomes, written through the real store and space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evomerge.fitness.scoring import TaskRule, aggregate, combine, combined_error, standard_error
from evomerge.fitness.selection import kept_baselines, search_score
from evomerge.recipe import Recipe, SourceRef, parse_recipe
from evomerge.records import Candidate, DocumentSet, Genome, Outcome, Place, TaskScore
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.settings import ParameterSettings
from evomerge.store import Run, Store

COUNTS = {"search": 40, "select": 60, "test": 120}
TASKS = ("arc_easy", "gsm8k_like", "german_grammar")


def places(layers: int) -> list[Place]:
    """Return the tensors of a small Llama-like model."""
    found = [Place("model.embed_tokens.weight", "embedding", None, 0.0)]
    for layer in range(layers):
        depth = layer / max(1, layers - 1)
        for part, role in (("self_attn.q_proj", "attention"), ("mlp.up_proj", "mlp"), ("norm", "norm")):
            found.append(Place(f"model.layers.{layer}.{part}.weight", role, layer, depth))  # type: ignore[arg-type]
    found.append(Place("lm_head.weight", "head", None, 1.0))
    return found


@dataclass
class Made:
    """Writes one run piece by piece.

    Attributes:
        store: Where.
        name: The run's name.
        tasks: Names of the tasks.
        sources: Names of the models that are merged; the base is called `base`.
        layers: Of the models.
        space: Over `space.method` and so on.
        kinds: Kinds of the tasks that are no plain means.
        one_number: A callable that returns one number per task.
        config: Changes to the run's config.
    """

    store: Store
    name: str = "demo"
    tasks: Sequence[str] = TASKS
    sources: Sequence[str] = ("math", "code", "german")
    layers: int = 16
    space: Mapping[str, Any] = field(
        default_factory=lambda: {
            "method": "ties",
            "granularity": {"anchors": 4},
            "split": ("attention", "mlp"),
            "parameters": {"density": {"low": 0.2, "high": 1.0, "granularity": "model"}, "lambda": "free"},
        }
    )
    kinds: Mapping[str, str] = field(default_factory=dict)
    one_number: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=lambda: COUNTS)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(7)
        refs = [
            SourceRef(name=n, path=f"models/{n}", fingerprint=f"{i + 10:02x}" * 32)
            for i, n in enumerate(("base", *self.sources))
        ]
        self.refs = {ref.name: ref for ref in refs}
        settings = ParameterSettings.model_validate(dict(self.space))
        self.decoder = ParameterSpace(settings, refs[0], refs[1:], places(self.layers), self.layers)
        self.rules = {
            t: TaskRule(
                self.kinds.get(t, "mean"),
                1.0,
                t not in self.kinds,
                "perplexity" if t in self.kinds else "acc",
                t,
            )
            for t in self.tasks
        }
        self.run: Run = self.store.create_run(self.name, self._config(), self._facts())
        self.numbers: dict[str, int] = {}
        self.hardness = {t: self.random.uniform(-0.6, 1.4) for t in self.tasks}
        self.good: dict[str, float] = {}
        if not self.one_number:
            for split, count in self.counts.items():
                self.run.add_document_set(split, {task: list(range(count)) for task in self.tasks})

    def _config(self) -> dict[str, Any]:
        return {"name": self.name, "seed": 3, "budget": {"evaluations": 200, "finalists": 4}, **self.config}

    def _facts(self) -> dict[str, Any]:
        return {
            "sources": {name: ref.model_dump(exclude_none=True) for name, ref in self.refs.items()},
            "fitness": "f" * 64,
            "rules": {} if self.one_number else {n: rule.to_json() for n, rule in self.rules.items()},
            "base_dir": "/tmp",
            "layers": self.layers,
            "family": "llama",
            "parameters": 1_235_814_400,
            "versions": {"torch": "2.9.1", "transformers": "5.3.0", "lm-eval": "0.4.13", "ray": "absent"},
        }

    def add(
        self,
        origin: str,
        recipe: Recipe,
        skill: float,
        index: int | None = None,
        generation: int = 0,
        genome: Genome | None = None,
    ) -> int:
        """Record a candidate with a skill (logit shift over all tasks)."""
        number = len(self.numbers)
        self.numbers[f"{origin}#{number}"] = number
        self.good[str(number)] = skill
        candidate = Candidate(number, origin, generation, index, genome, recipe.to_json(), recipe.digest)
        self.run.add_candidate(candidate, 0)
        return number

    def outcome(self, number: int, key: str) -> Outcome:
        """Return a plausible outcome."""
        count = 1 if self.one_number else self.counts[DocumentSet.of_key(key).split]
        values: dict[str, Any] = {}
        for i, (task, rule) in enumerate(self.rules.items()):
            seed = [len(key), i, 1]
            difficulty = np.random.default_rng(seed).normal(self.hardness[task], 1.2, count)
            chance = 1 / (1 + np.exp(difficulty - self.good[str(number)]))
            if self.one_number:
                values[task] = [float(chance.mean())]
            elif rule.kind == "mean":
                values[task] = (self.random.random(count) < chance).astype(float).tolist()
            else:
                values[task] = (np.log(chance) * 2 - 1).tolist()
        metrics = {t: aggregate(rule, values[t]) for t, rule in self.rules.items()}
        errors = {t: standard_error(rule, values[t]) for t, rule in self.rules.items()}
        return Outcome(
            number,
            key,
            "ok",
            score=float(combine(self.rules, metrics)),
            stderr=combined_error(self.rules, errors),
            tasks={t: TaskScore(metrics[t], errors[t]) for t in self.rules},
            values=values,
            cost={"merge": 0.4, "evaluate": 2.0 + 0.01 * count, "total": 2.6 + 0.01 * count, "attempts": 1},
        )

    def score(self, number: int, key: str) -> None:
        """Record a plausible outcome."""
        self.run.add_outcome(self.outcome(number, key), "f" * 64)

    def fail(self, number: int, reason: str, status: Any = "failed", key: str = "search") -> None:
        """Record a failure."""
        self.run.add_outcome(Outcome(number, key, status, reason=reason, cost={"merge": 0.4}), "f" * 64)

    def linear(self, names: Sequence[str]) -> Recipe:
        """Return the average of sources."""
        refs = [self.refs[name].model_dump(exclude_none=True) for name in names]
        return parse_recipe({"method": "linear", "sources": refs}, "test")

    def arithmetic(self, scale: float) -> Recipe:
        """Return task arithmetic at a scale."""
        refs = [self.refs[name].model_dump(exclude_none=True) for name in self.sources]
        base = self.refs["base"].model_dump(exclude_none=True)
        data = {"method": "task_arithmetic", "base": base, "sources": refs, "parameters": {"lambda": scale}}
        return parse_recipe(data, "test")

    def baselines(self) -> list[int]:
        """Record and score the sources and the simple merges; return those that count."""
        numbers = [
            self.add(f"source:{n}", self.linear([n]), -0.9 + 0.35 * i) for i, n in enumerate(self.refs)
        ]
        numbers.append(self.add("baseline:uniform", self.linear(self.sources), 0.25))
        for scale in (0.4, 0.7):
            number = self.add(f"baseline:task_arithmetic@{scale}", self.arithmetic(scale), 0.2 + scale / 2)
            numbers.append(number)
        for number in numbers:
            self.score(number, "search")
        found = search_score(self.run.outcomes(values=False))
        return [c.number for c in kept_baselines(self.run.candidates(), found)]

    def search(
        self, count: int, *, fails: Mapping[int, tuple[str, str]] | None = None, resampled: bool = False
    ) -> list[int]:
        """Record candidates whose skill rises; some fail, by index."""
        numbers = []
        for index in range(count):
            genome = tuple(
                float(self.random.random()) if d.kind == "real" else 0.0 for d in self.decoder.dimensions
            )
            skill = 0.9 * (1 - math.exp(-index / 40)) + float(self.random.normal(0, 0.25)) - 0.1
            generation = index // 10
            number = self.add("optimizer", self.decoder.decode(genome), skill, index, generation, genome)
            key = f"search@{generation}" if resampled else "search"
            failure = (fails or {}).get(index)
            if failure:
                self.fail(number, failure[1], failure[0], key)
            else:
                self.score(number, key)
            numbers.append(number)
        return numbers

    def finish(self, baselines: Sequence[int], searched: Sequence[int], *, test: bool = True) -> int:
        """Score the best four on select, the best of them and the baselines on test; return it."""
        scored = {
            o.candidate: o.score if o.score is not None else -math.inf
            for o in self.run.outcomes(values=False)
        }
        best = sorted(searched, key=lambda n: -scored.get(n, -math.inf))[:4]
        for number in (*best, *baselines):
            self.score(number, "select")
        selected = {
            o.candidate: o.score if o.score is not None else -math.inf for o in self.run.outcomes("select")
        }
        winner = max(best, key=lambda n: selected[n])
        if test:
            self.run.add_event("test_opened", {"winner": winner, "look": 1})
            for number in (winner, *baselines):
                self.score(number, "test")
        return winner


FAILURES = {
    7: ("invalid", "merged weights are not finite: model.layers.3.mlp.up_proj.weight"),
    8: ("invalid", "merged weights are not finite: model.layers.11.mlp.up_proj.weight"),
    31: ("failed", "CUDA out of memory: tried to allocate 2.31 GiB"),
    55: ("failed", "no answer within 600 s; the worker was ended"),
}


def finished(store: Store, count: int = 120, **options: Any) -> Made:
    """Make a run with everything in it."""
    made = Made(store, **options)
    made.run.add_event("started", {"pid": 1, "workers": 2})
    baselines = made.baselines()
    searched = made.search(count, fails=FAILURES)
    made.finish(baselines, searched)
    made.run.release("finished")
    return made
