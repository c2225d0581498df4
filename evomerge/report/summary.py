"""What a run found, as plain data computed from its store: the source of every table, page and card."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from evomerge.fitness.scoring import Interval, Resampled, TaskRule, plain_rules
from evomerge.fitness.selection import (
    LEVEL,
    Gain,
    baseline_name,
    by_select,
    finalists,
    is_baseline,
    kept_baselines,
    search_score,
    winner,
)
from evomerge.records import Candidate, Outcome
from evomerge.store import RunView

FAILED_SHOWN = 5
"""How many outcomes without a score `show` lists."""


class Summary:
    """A run's candidates and outcomes, and what follows from them.

    Attributes:
        run: The run.
        candidates: All candidates by number, without genome and recipe; `recipe` has these.
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
        self.candidates = {candidate.number: candidate for candidate in run.candidates(whole=False)}
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

    @cached_property
    def rules(self) -> dict[str, TaskRule]:
        """Task name to rule."""
        if self.run.facts.get("rules"):
            return {name: TaskRule(**rule) for name, rule in self.run.facts["rules"].items()}
        values = next((o.values for o in self.outcomes.values() if o.values), {})
        return plain_rules(values)

    @cached_property
    def _resampled(self) -> dict[str, tuple[list[int], Resampled]]:
        """Split to the numbers of the models that intervals are given for, and their resamples."""
        found = {}
        seed = int(self.run.config.get("seed", 0))
        shown = [*([] if self.best is None else [self.best]), *(c.number for c in self.baselines)]
        for key in ("select", "test"):
            scored = {n: self.outcomes[n, key] for n in dict.fromkeys(shown) if (n, key) in self.outcomes}
            numbers = [
                n for n, o in scored.items() if o.status == "ok" and o.values.keys() == self.rules.keys()
            ]
            if numbers:
                values = [scored[n].values for n in numbers]
                found[key] = numbers, Resampled(self.rules, values, level=LEVEL, seed=seed)
        return found

    def recipe(self, number: int) -> dict[str, Any]:
        """Return a candidate's recipe as plain data."""
        return dict(self.run.candidate(number).recipe)

    def scores(self, number: int, key: str) -> dict[str, Any] | None:
        """Return a candidate's score on a document set with intervals where there are any; None if unscored.

        Intervals are given on `select` and `test` for the best candidate and the baselines.
        """
        outcome = self.outcomes.get((number, key))
        if outcome is None or outcome.score is None:
            return None
        data: dict[str, Any] = {
            "score": outcome.score,
            "stderr": outcome.stderr,
            "tasks": {n: {"metric": t.metric, "stderr": t.stderr} for n, t in outcome.tasks.items()},
        }
        numbers, resampled = self._resampled.get(key, ([], None))
        if resampled is not None and number in numbers:
            model = numbers.index(number)
            data |= _ends(resampled.score(model))
            for name, task in data["tasks"].items():
                task |= _ends(resampled.task(model, name))
        return data

    def row(self, candidate: Candidate, name: str) -> dict[str, Any]:
        """Return one line of the result table."""
        number = candidate.number
        return {
            "name": name,
            "candidate": number,
            "origin": candidate.origin,
            "search": self.search.get(number),
            "select": self.scores(number, "select"),
            "test": self.scores(number, "test"),
        }

    @cached_property
    def gains(self) -> list[Gain]:
        """The winner's gain over each baseline on test; the best baseline on select comes first."""
        numbers, resampled = self._resampled.get("test", ([], None))
        if self.best is None or not self.chosen or resampled is None or self.best not in numbers:
            return []
        mine = numbers.index(self.best)
        return [
            Gain(baseline_name(c), resampled.gain(mine, numbers.index(c.number)))
            for c in by_select(self.baselines, self.outcomes)
            if c.number in numbers
        ]

    @property
    def verdict(self) -> str:
        """One sentence: whether the winner beats the best baseline."""
        if self.best is None:
            return "No candidate has been scored."
        if not self.chosen:
            score = f"{self.search[self.best]:.3f}"
            return (
                f"No winner has been chosen yet. The best search score so far is {score}; that is optimistic."
            )
        if (self.best, "test") not in self.outcomes:
            return "The winner has not been measured on the test documents yet."
        if not self.gains:
            return "The winner was measured on the test documents; there is no baseline to compare it with."
        gain, mean = self.gains[0], f"{100 * self.gains[0].interval.mean:+.1f} points"
        if gain.interval.low is None or gain.interval.high is None:
            return (
                f"On test the winner scores {mean} against the best baseline, {gain.over}; with one number "
                "per task, how much of it is chance is unknown."
            )
        points = f"{mean} ({100 * gain.interval.low:+.1f} to {100 * gain.interval.high:+.1f})"
        hardest = min(self.gains, key=lambda gain: gain.interval.mean)
        also = ""
        if hardest is not gain:
            also = f" Over {hardest.over}, the best on test, it is {100 * hardest.interval.mean:+.1f}."
        if gain.shown:
            return f"On test the winner beats {gain.over}, the best baseline on select, by {points}.{also}"
        relation = "is worse than" if gain.interval.high < 0 else "is not shown to beat"
        return (
            f"On test the winner {relation} {gain.over}, the best baseline on select: {points}.{also} "
            "Prefer the baseline, or search longer or with more documents."
        )

    def failures(self) -> list[dict[str, Any]]:
        """Return every outcome without a score."""
        return [
            {"candidate": o.candidate, "documents": o.documents, "status": o.status, "reason": o.reason}
            for o in self.outcomes.values()
            if o.score is None
        ]

    def optimizer_lines(self) -> list[str]:
        """Return what the optimizer did by itself: restarts, plateaus, and why it ended, if it did."""
        told = {"optimizer": "note", "optimizer_finished": "reason"}
        return [f"optimizer: {e.data[told[e.kind]]}" for e in self.run.events(kind=told)]

    def evaluation(self) -> dict[str, float]:
        """Return what scoring took over all outcomes: tokens, documents, and what was saved.

        `unshared_tokens` is what forwarding every request by itself would have taken; `stopped` counts
        candidates that lost a race, which left out `skipped_documents`.
        """
        names = ("tokens", "unshared_tokens", "generated", "truncated", "documents", "skipped_documents")
        total = dict.fromkeys(names, 0.0)
        for outcome in self.outcomes.values():
            for name in names:
                total[name] += outcome.cost.get(name, 0.0)
        return {**total, "stopped": float(sum(o.status == "stopped" for o in self.outcomes.values()))}

    def evaluation_lines(self) -> list[str]:
        """Return what people should know of how the candidates were scored."""
        cost, lines = self.evaluation(), []
        if cost["unshared_tokens"] > cost["tokens"] > 0:
            whole = cost["unshared_tokens"] / cost["tokens"]
            lines.append(
                f"forwarded {cost['tokens']:,.0f} tokens; each request by itself: {whole:.1f} times that"
            )
        if cost["stopped"]:
            left_out = f"{cost['skipped_documents']:,.0f} documents unscored"
            lines.append(f"candidates that racing stopped: {cost['stopped']:.0f}, {left_out}")
        if cost["truncated"]:
            lines.append(
                f"{cost['truncated']:,.0f} requests are longer than the model reads; as in lm-eval, their "
                "beginning is left out"
            )
        return lines

    def seconds(self) -> dict[str, float]:
        """Return worker seconds by phase over all outcomes."""
        total: dict[str, float] = {"merge": 0.0, "evaluate": 0.0}
        for outcome in self.outcomes.values():
            for phase in total:
                total[phase] += outcome.cost.get(phase, 0.0)
        return total

    def progress(self) -> list[tuple[Candidate, Outcome]]:
        """Return the optimizer's candidates with their search outcomes, in the order they were asked.

        Those that were stopped early are left out.
        """
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
                if outcome is not None and outcome.status != "stopped":
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
                "recipe": self.recipe(self.best),
                "digest": candidate.digest,
            }
        found = [
            {
                "over": gain.over,
                "mean": gain.interval.mean,
                **_ends(gain.interval),
                "level": LEVEL,
                "shown": gain.shown,
            }
            for gain in self.gains
        ]
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
            "verdict": self.verdict,
            "looks_at_test": len(run.events(kind="test_opened")),
            "seconds": self.seconds(),
            "evaluation": self.evaluation(),
            "optimizer": self.optimizer_lines(),
            "notes": self.evaluation_lines(),
            "failed": self.failures()[:FAILED_SHOWN],
        }


def status_of(run: RunView) -> str:
    """Return the run's status; `interrupted` if it says running but its driver is gone."""
    return "interrupted" if run.status == "running" and not run.owner_alive else run.status


def _ends(interval: Interval) -> dict[str, float | None]:
    return {"low": interval.low, "high": interval.high}
