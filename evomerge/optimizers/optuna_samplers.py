"""Optuna's samplers behind the ask/tell contract.

The study lives in memory and is rebuilt on resume. Each proposal gets a fresh sampler, seeded by the
proposal's index, so a sampler's generator and caches never outlive one `ask`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState, create_trial

from evomerge.errors import ConfigError
from evomerge.optimizers.base import StateError, SteadyOptimizer
from evomerge.optimizers.settings import OptunaSettings
from evomerge.records import Genome, Proposal
from evomerge.seeding import derive
from evomerge.spaces.dimensions import Dimension, check_genome

_MOST_FREE = {"tpe": 5000, "gp": 1000, "cmaes": 500, "nsga2": 20_000, "qmc": 20_000}
"""Free dimensions up to which a sampler proposes within some seconds."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class OptunaSampler(SteadyOptimizer):
    """One of Optuna's samplers: tpe, gp, cmaes, nsga2 or qmc.

    All take outcomes one by one and allow any number of outstanding proposals; the asks of a run therefore
    depend on which outcomes were known at each ask. Failures are FAIL trials, which the samplers leave out.
    `tpe` and `gp` depend on the history alone and adopt without sampling; `qmc` depends on nothing; `cmaes`
    and `nsga2` keep notes in the study, so a resume must replay asks and tells in their order.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        seed: int,
        settings: OptunaSettings | None = None,
        start: Genome | None = None,
    ) -> None:
        """Set up an empty study.

        Args:
            dimensions: What to vary.
            seed: Root of the random streams.
            settings: Defaults (tpe) if None.
            start: The first proposal; None: the sampler's own.

        Raises:
            ConfigError: No dimension has more than one value, or cmaes shall vary a categorical one.
            ValueError: `start` is no genome of these dimensions.
        """
        super().__init__(dimensions, seed, start)
        self.settings = settings or OptunaSettings()
        sampler = self.settings.sampler
        self.rank_based = sampler != "gp"
        self.ordered_replay = sampler in ("cmaes", "nsga2")
        if sampler == "cmaes" and any(one.kind == "categorical" and one.free for one in self.dimensions):
            raise ConfigError(
                "optimizer.sampler: Optuna's cmaes draws categorical dimensions blindly; "
                'use tpe, nsga2, or the optimizer "cma_es"'
            )
        free = sum(one.free for one in self.dimensions)
        if free > _MOST_FREE[sampler]:
            raise ConfigError(
                f"optimizer.sampler: {sampler} takes too long over {free:,} free dimensions, at most "
                f'{_MOST_FREE[sampler]:,}; use the optimizer "cma_es" or "niches", or a coarser granularity'
            )
        self._distributions = {
            f"d{place:05d}": _distribution(dimension) for place, dimension in enumerate(self.dimensions)
        }
        self._study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
        if sampler == "qmc":
            # The sequence begins once there is a scored trial; outcomes must not decide when that is.
            zeros = dict.fromkeys(self._distributions, 0)
            self._study.add_trial(create_trial(params=zeros, distributions=self._distributions, value=0.0))
        self._first_number = len(self._study.trials)  # every proposal is one trial, in order
        self._start = start

    def adopt(self, proposal: Proposal) -> None:
        """Take over a proposal: tpe and gp register it as it is, the others draw again and compare.

        Raises:
            StateError: It is not the next proposal, no genome of these dimensions, or differs from the draw.
        """
        if self.settings.sampler not in ("tpe", "gp"):
            super().adopt(proposal)
            return
        if proposal.index != self.asked:
            raise StateError(f"proposal {proposal.index} cannot be next, {self.asked} is")
        try:
            check_genome(self.dimensions, proposal.genome)
        except ValueError as error:
            raise StateError(f"proposal {proposal.index} does not fit this space: {error}") from error
        self._register(proposal.genome)
        self._hand_out(proposal)

    def _draw(self, index: int) -> tuple[int, Genome]:
        if index == 0 and self._start is not None:
            genome = tuple(map(float, self._start))
            self._register(genome)
            return index, genome
        with _quiet():
            self._study.sampler = self._sampler(index)
            trial = self._study.ask(fixed_distributions=self._distributions)
        return index, tuple(float(trial.params[name]) for name in self._distributions)

    def _take(self, index: int, score: float | None) -> None:
        number = self._first_number + index
        with _quiet():
            if score is None:
                self._study.tell(number, state=TrialState.FAIL)
            else:
                self._study.tell(number, score)
        super()._take(index, score)

    def _register(self, genome: Genome) -> None:
        params = {
            name: value if isinstance(distribution, FloatDistribution) else int(value)
            for (name, distribution), value in zip(self._distributions.items(), genome, strict=True)
        }
        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions)
        )

    def _sampler(self, index: int) -> BaseSampler:
        settings = self.settings
        seed = derive(self.seed, "optuna", index) % 2**32
        startup = {} if settings.startup is None else {"n_startup_trials": settings.startup}
        if settings.sampler == "tpe":
            return TPESampler(
                seed=seed,
                multivariate=settings.multivariate is not False,
                constant_liar=settings.constant_liar is not False,
                **startup,
            )
        if settings.sampler == "gp":
            return GPSampler(seed=seed, **startup)
        if settings.sampler == "cmaes":
            return CmaEsSampler(
                seed=seed, popsize=settings.population, warn_independent_sampling=False, **startup
            )
        if settings.sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=settings.population or 50)
        return QMCSampler(
            qmc_type=settings.sequence or "sobol",
            scramble=True,
            seed=derive(self.seed, "optuna", "qmc") % 2**32,
            independent_sampler=RandomSampler(seed=seed),
            warn_independent_sampling=False,
        )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "real":
        return FloatDistribution(0.0, 1.0)
    if dimension.kind == "integer":
        return IntDistribution(0, dimension.size - 1)
    return CategoricalDistribution(range(dimension.size))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
