"""What a run found, as plain data computed from its store: the source of every table, page and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.fitness.scoring import TaskRule, bootstrap
from evomerge.fitness.selection import (
    LEVEL,
    baseline_name,
    finalists,
    gains,
    is_baseline,
    kept_baselines,
    search_score,
    winner,
)
from evomerge.records import Candidate, Outcome
from evomerge.store import RunView


class Summary:
    """A run's candidates and outcomes, and what follows from them.

    Attributes:
        run: The run.
        candidates: All candidates by number.
        outcomes: (candidate number, document set key) to outcome.
        search: Candidate number to search score.
        best: Number of the winner on select documents; of the best by search score while there is none;
            None before the first.
        chosen: Whether `best` was chosen on select documents.
        baselines: The baselines that count.
    """

    def __init__(self, run: RunView) -> None:
        self.run = run
        self.outcomes = {(o.candidate, o.documents): o for o in run.outcomes(values=False)}
        for key in ("select", "test"):
            self.outcomes.update({(o.candidate, key): o for o in run.outcomes(key)})
        # Read after the outcomes: a run that goes on may record a candidate and its outcome in between.
        self.candidates = {candidate.number: candidate for candidate in run.candidates()}
        self.search = search_score(self.outcomes.values())
        ordered = list(self.candidates.values())
        self.baselines = kept_baselines(ordered, self.search)
        means = [c.number for c in ordered if c.origin == "mean"]
        budget = run.config.get("budget") or {}
        self.finalists = finalists(ordered, self.search, int(budget.get("finalists", 8)), means)
        selected = winner(self.finalists, self.outcomes)
        searched = [(s, -n) for n, s in self.search.items() if not is_baseline(self.candidates[n])]
        self.chosen = selected is not None
        self.best = selected if selected is not None else (-max(searched)[1] if searched else None)

    @property
    def rules(self) -> dict[str, TaskRule]:
        """Task name to rule."""
        if self.run.facts.get("rules"):
            return {name: TaskRule(**rule) for name, rule in self.run.facts["rules"].items()}
        values = next((o.values for o in self.outcomes.values() if o.values), {})
        # As `fitness.function.rules_of`, which lives beside torch.
        return {name: TaskRule("mean", 1.0, True, "score", name) for name in values}

    def scores(self, number: int, key: str, *, interval: bool = False) -> dict[str, Any] | None:
        """Return a candidate's score on a document set; None if it has none.

        Args:
            number: The candidate.
            key: The document set.
            interval: Add the bootstrap interval, from the documents' values.
        """
        outcome = self.outcomes.get((number, key))
        if outcome is None or outcome.score is None:
            return None
        data: dict[str, Any] = {
            "score": outcome.score,
            "stderr": outcome.stderr,
            "tasks": {n: {"metric": t.metric, "stderr": t.stderr} for n, t in outcome.tasks.items()},
        }
        if interval and outcome.values:
            found = bootstrap(self.rules, outcome.values, level=LEVEL, seed=self._seed)
            data |= {"low": found.low, "high": found.high}
            for name, task in data["tasks"].items():
                alone = bootstrap(
                    {name: _positive(self.rules[name])},
                    {name: outcome.values[name]},
                    level=LEVEL,
                    seed=self._seed,
                )
                task |= {"low": alone.low, "high": alone.high}
        return data

    @property
    def _seed(self) -> int:
        return int(self.run.config.get("seed", 0))

    def row(self, candidate: Candidate, name: str) -> dict[str, Any]:
        """Return one line of the result table."""
        number = candidate.number
        return {
            "name": name,
            "candidate": number,
            "origin": candidate.origin,
            "search": self.search.get(number),
            "select": self.scores(number, "select", interval=True),
            "test": self.scores(number, "test", interval=True),
        }

    def gains(self) -> list[dict[str, Any]]:
        """Return the winner's gain over each baseline on test; the best baseline on select comes first."""
        if self.best is None or not self.chosen:
            return []
        found = gains(self.best, self.baselines, self.outcomes, self.rules, self._seed)
        return [
            {
                "over": gain.over,
                "mean": gain.interval.mean,
                "low": gain.interval.low,
                "high": gain.interval.high,
                "level": gain.interval.level,
                "shown": gain.shown,
            }
            for gain in found
        ]

    def failures(self) -> list[dict[str, Any]]:
        """Return every outcome that is not ok."""
        return [
            {"candidate": o.candidate, "documents": o.documents, "status": o.status, "reason": o.reason}
            for o in self.outcomes.values()
            if o.status != "ok"
        ]

    def seconds(self) -> dict[str, float]:
        """Return worker seconds by phase over all outcomes."""
        total: dict[str, float] = {"merge": 0.0, "evaluate": 0.0}
        for outcome in self.outcomes.values():
            for phase in total:
                total[phase] += outcome.cost.get(phase, 0.0)
        return total

    def progress(self) -> list[tuple[Candidate, Outcome]]:
        """Return the optimizer's candidates with their search outcomes, in the order they were asked."""
        pairs = []
        for candidate in self.candidates.values():
            if candidate.index is not None:
                keys = (f"search@{candidate.generation}", "search")
                outcome = next(
                    (
                        self.outcomes[candidate.number, k]
                        for k in keys
                        if (candidate.number, k) in self.outcomes
                    ),
                    None,
                )
                if outcome is not None:
                    pairs.append((candidate, outcome))
        return pairs

    def to_json(self) -> dict[str, Any]:
        """Return everything `show --json` prints."""
        run = self.run
        best: dict[str, Any] | None = None
        if self.best is not None:
            candidate = self.candidates[self.best]
            best = {
                **self.row(candidate, "winner"),
                "chosen_on": "select" if self.chosen else "search",
                "recipe": dict(candidate.recipe),
                "digest": candidate.digest,
            }
        found = self.gains()
        evaluations = sum(c.index is not None for c in self.candidates.values())
        return {
            "name": run.name,
            "status": status_of(run),
            "error": run.error,
            "created": run.created,
            "updated": run.updated,
            "evaluations": evaluations,
            "outcomes": len(self.outcomes),
            "failures": len(self.failures()),
            "best": best,
            "baselines": [self.row(c, baseline_name(c)) for c in self.baselines],
            "gain": found[0] if found else None,
            "gains": found,
            "looks_at_test": sum(event.kind == "test_opened" for event in run.events()),
            "seconds": self.seconds(),
        }


def status_of(run: RunView) -> str:
    """Return the run's status; `interrupted` if it says running but its driver is gone."""
    return "interrupted" if run.status == "running" and not run.owner_alive else run.status


def verdict(gains: Sequence[Mapping[str, Any]]) -> str:
    """Return in one sentence whether the winner beats the best baseline."""
    if not gains:
        return "The winner has not been measured on the test documents yet."
    first = gains[0]
    points = f"{100 * first['mean']:+.1f} points ({100 * first['low']:+.1f} to {100 * first['high']:+.1f})"
    if first["low"] > 0:
        return f"On test the winner beats the best baseline, {first['over']}, by {points}."
    return (
        f"On test the winner is not shown to beat the best baseline, {first['over']}: {points}. "
        "Prefer the baseline, or search with more documents."
    )


def _positive(rule: TaskRule) -> TaskRule:
    return TaskRule(rule.kind, 1.0, True, rule.metric, rule.group)
