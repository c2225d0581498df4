"""A run as an Optuna study, for optuna-dashboard and whatever else reads studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL

from evomerge.errors import UserError
from evomerge.records import Candidate, Genome
from evomerge.spaces.parameter import Gene, Group
from evomerge.spaces.settings import Span
from evomerge.trackers.base import Ending, Scored, TrackedRun, Tracker
from evomerge.trackers.targets import Target

MOST_PARAMS = 500
"""A space with more dimensions is shown without its parameters."""

_STATES = {"ok": TrialState.COMPLETE, "stopped": TrialState.PRUNED}

_KEY, _STEPS = "evomerge:run", "evomerge:outcomes"


class OptunaStudy(Tracker):
    """Writes a study with the run's name into a database of Optuna's.

    A trial is a candidate and has its number; its value is the search score. It is complete when scored,
    pruned when it lost a race (its intermediate value is the estimate, at the number of documents scored),
    and failed when it has no score. What was found on select and test documents is an attribute of the study.

    Args:
        target: A SQLite file, or the URL of a database that SQLAlchemy knows.
    """

    def __init__(self, target: Target) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._target = target
        url = target.where if target.is_url else URL.create("sqlite", database=str(target.path))
        self._storage = optuna.storages.RDBStorage(
            str(url) if isinstance(url, str) else url.render_as_string(hide_password=False)
        )
        self._study = 0
        self._trials: list[tuple[int, bool]] = []
        self._space = Parameters({})

    def started(self, run: TrackedRun) -> int:
        """Find or make the study."""
        storage = self._storage
        study = optuna.create_study(
            storage=storage, study_name=run.name, direction="maximize", load_if_exists=True
        )
        self._study, attributes = study._study_id, study.user_attrs
        if attributes.get(_KEY, None if study.trials else run.key) != run.key:
            raise UserError(f'{self._target} has another study "{run.name}"; give another file')
        study.set_user_attr(_KEY, run.key)
        for name, value in _about(run).items():
            study.set_user_attr(name, value)
        self._space = Parameters(run.facts)
        self._trials = [
            (trial._trial_id, trial.state.is_finished()) for trial in study.get_trials(deepcopy=False)
        ]
        return int(attributes.get(_STEPS, 0))

    def record(self, candidates: Sequence[Candidate], scored: Sequence[Scored]) -> None:
        """Add trials, and end those that are scored."""
        searched = {
            entry.candidate.number: entry for entry in scored if entry.phase in ("search", "baselines")
        }
        for candidate in candidates[
            max(0, len(self._trials) - (candidates[0].number if candidates else 0)) :
        ]:
            entry = searched.get(candidate.number)
            trial = self._storage.create_new_trial(self._study, template_trial=self._trial(candidate, entry))
            self._trials.append((trial, entry is not None))
        for number, entry in searched.items():
            self._end(number, entry)
        for entry in scored:
            if entry.phase in ("select", "test"):
                known = dict(self._attributes().get(entry.phase, {}))
                known[str(entry.candidate.number)] = entry.outcome.score
                self._storage.set_study_user_attr(self._study, entry.phase, known)
        if scored:
            self._storage.set_study_user_attr(self._study, _STEPS, scored[-1].step)

    def finished(self, ending: Ending) -> None:
        """Say what was found; candidates that were never scored on search documents become failed trials."""
        found = {"status": ending.status, "error": ending.error, "verdict": ending.verdict}
        for name, value in {**found, "winner": ending.winner, "winner scores": dict(ending.scores)}.items():
            self._storage.set_study_user_attr(self._study, name, value)
        if ending.status != "finished":
            return
        for number, (trial, ended) in enumerate(self._trials):
            if not ended:
                self._storage.set_trial_user_attr(trial, "reason", "not scored on search documents")
                self._storage.set_trial_state_values(trial, TrialState.FAIL)
                self._trials[number] = (trial, True)

    def close(self) -> None:
        """Close the connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _attributes(self) -> dict[str, Any]:
        return dict(self._storage.get_study_user_attrs(self._study))

    def _trial(self, candidate: Candidate, entry: Scored | None) -> FrozenTrial:
        """Return a candidate's trial: ended, if it is scored already."""
        params, distributions = self._space.of(candidate.genome)
        attributes: dict[str, Any] = {"origin": candidate.origin, "generation": candidate.generation}
        state = TrialState.RUNNING
        values: dict[str, Any] = {}
        if entry is not None:
            state = _STATES.get(entry.outcome.status, TrialState.FAIL)
            attributes |= _attributes(entry)
            values["intermediate_values"] = _intermediate(entry)
            values["value"] = entry.outcome.score if state is TrialState.COMPLETE else None
        trial = create_trial(
            state=state, params=params, distributions=distributions, user_attrs=attributes, **values
        )
        if entry is not None and entry.at is not None:
            trial.datetime_complete = datetime.fromtimestamp(entry.at)
            trial.datetime_start = trial.datetime_complete - timedelta(
                seconds=entry.outcome.cost.get("total", 0.0)
            )
        return trial

    def _end(self, number: int, entry: Scored) -> None:
        trial, ended = self._trials[number]
        if ended:
            return
        for name, value in _attributes(entry).items():
            self._storage.set_trial_user_attr(trial, name, value)
        for step, value in _intermediate(entry).items():
            self._storage.set_trial_intermediate_value(trial, step, value)
        state = _STATES.get(entry.outcome.status, TrialState.FAIL)
        values = None if state is not TrialState.COMPLETE else [float(entry.outcome.score or 0.0)]
        self._storage.set_trial_state_values(trial, state, values)
        self._trials[number] = (trial, True)


class Parameters:
    """The parameters of a run's space under Optuna's names: bounds where the run knows them, else [0, 1].

    Args:
        facts: The run's facts.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._space = [tuple(dimension) for dimension in facts.get("space", ())]
        spans = facts.get("spans") or ()
        self._genes = [Gene("", None, Group(), 0, Span.model_validate(span)) for span in spans]
        if len(self._genes) != len(self._space):
            self._genes = []

    def of(self, genome: Genome | None) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Return values and distributions; none for a recipe outside the space or a very large space."""
        if genome is None or len(genome) != len(self._space) or len(genome) > MOST_PARAMS:
            return {}, {}
        values: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for place, ((label, kind, size), number) in enumerate(zip(self._space, genome, strict=True)):
            gene = self._genes[place] if self._genes else None
            if gene is not None and gene.span.choices:
                values[label], distributions[label] = (
                    gene.value(number),
                    CategoricalDistribution(gene.span.choices),
                )
            elif gene is not None and kind == "real":
                low, high = float(gene.span.low or 0.0), float(gene.span.high or 0.0)
                values[label], distributions[label] = (
                    gene.value(number),
                    FloatDistribution(low, high, gene.span.log),
                )
            elif kind == "real":
                values[label], distributions[label] = number, FloatDistribution(0.0, 1.0)
            elif kind == "integer":
                values[label], distributions[label] = int(number), IntDistribution(0, size - 1)
            else:
                values[label], distributions[label] = int(number), CategoricalDistribution(range(size))
        return values, distributions


def _about(run: TrackedRun) -> dict[str, Any]:
    config = run.config
    sources = list(run.facts.get("sources", {}))
    return {
        "optimizer": config.get("optimizer", {}).get("name", ""),
        "method": config.get("space", {}).get("method", ""),
        "seed": config.get("seed", 0),
        "sources": sources,
        "budget": config.get("budget", {}).get("evaluations"),
    }


def _attributes(entry: Scored) -> dict[str, Any]:
    outcome = entry.outcome
    found: dict[str, Any] = {"documents": outcome.documents}
    if outcome.reason:
        found["reason"] = outcome.reason
    if outcome.stderr is not None:
        found["stderr"] = outcome.stderr
    found |= {f"task {name}": task.metric for name, task in outcome.tasks.items()}
    return found | {f"seconds {name}": s for name, s in outcome.cost.items() if name in ("merge", "evaluate")}


def _intermediate(entry: Scored) -> dict[int, float]:
    """Return the score at the number of documents that it is of."""
    documents = int(entry.outcome.cost.get("documents", 0))
    return {} if entry.outcome.score is None else {documents: entry.outcome.score}
