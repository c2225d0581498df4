"""CMA-ES with restarts over real, integer and categorical dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from evomerge.errors import ConfigError
from evomerge.optimizers.base import Optimizer, StateError
from evomerge.optimizers.cma_models import MixedModel, Model, RealModel, default_population
from evomerge.optimizers.packing import pack, unpack
from evomerge.optimizers.random_search import uniform_genome
from evomerge.optimizers.settings import CmaEsSettings
from evomerge.records import Genome
from evomerge.seeding import derive
from evomerge.spaces.dimensions import Dimension

LARGEST_GROWTH = 8
"""The population grows at restarts to at most this many times the first one."""

MOST_FULL = 1000
"""Free dimensions up to which a real space may have a full covariance."""

PATIENCE = 3
"""How many generations in a row may all fail, or all score the same, and how often the latter may restart."""

_COUNTERS = (
    "_asked",
    "_generation",
    "_restart",
    "_age",
    "_best",
    "_stale",
    "_flat",
    "_barren",
    "_median",
    "_lowest",
    "_highest",
    "finished",
)


class CmaEs(Optimizer):
    """Covariance matrix adaptation evolution strategy from the `cmaes` library.

    Real spaces use CMA with learning-rate adaptation, or above `separable_above` free dimensions a diagonal
    covariance without it; spaces with integer or categorical dimensions use CatCMA with margin. The library
    is told ranks, so only the order of the scores matters; failures rank last and ties go to the lower index.

    The search restarts from a random mean with a larger population when all scores of a generation are equal
    three times in a row, when the best score has not improved for `restart_after` generations, when its steps
    vanish or explode, or when the library stops. It finishes when three generations in a row fail entirely,
    or when it would restart for the third time and no two scores ever differed.

    `recommendation` gives the mean of the distribution: under noise it is better than any single candidate.
    After restarts it also gives the best mean at the end of an earlier one; means are compared by the median
    score of the generation they were formed from, failures counting as the worst.
    """

    generational = True
    rounding = 1e-9

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        seed: int,
        settings: CmaEsSettings | None = None,
        start: Genome | None = None,
    ) -> None:
        """Set up the first generation.

        Args:
            dimensions: What to vary.
            seed: Root of the random streams.
            settings: Defaults if None.
            start: Initial mean; None: the centre of the box, and equal chances for all categories.

        Raises:
            ConfigError: No dimension has more than one value.
            ValueError: `start` is no genome of these dimensions.
        """
        super().__init__(dimensions, seed, start)
        self.settings = settings or CmaEsSettings()
        self._start = start
        self._generation = 0
        self._kept: tuple[float | None, Genome] | None = None
        self._lowest: float | None = None  # of all scores of the run
        self._highest: float | None = None
        self._begin(restart=0)

    @property
    def population(self) -> int:
        """Candidates in the current generation."""
        return self._model.population

    def recommendation(self) -> list[Genome]:
        """Return the mean, and the best mean of the ended restarts if there are any, the better one first."""
        means = [] if self._kept is None else [self._kept]
        if self._age:
            means.append((self._median, self._model.mean(self._numbers)))
        means.sort(key=lambda mean: _or_worst(mean[0]), reverse=True)
        return [genome for _, genome in means]

    def state(self) -> dict[str, Any] | None:
        """Return a snapshot between generations, None within one."""
        if self._solutions:
            return None
        return {
            "kind": self._kind(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "kept": None if self._kept is None else [self._kept[0], list(self._kept[1])],
            "numbers": pack(self._numbers),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot."""
        try:
            if state["kind"] != self._kind():
                raise ValueError(f"made by {state['kind']}, this is {self._kind()}")
            counters = {name: state["counters"][name] for name in _COUNTERS}
            self._begin(counters["_restart"])
            numbers = unpack(state["numbers"])
            self._model.check(numbers)
            kept = state["kept"]
            self._kept = None if kept is None else (kept[0], tuple(map(float, kept[1])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the snapshot cannot be used: {error}") from error
        self._numbers = numbers
        self._outstanding = set()
        for name, value in counters.items():
            setattr(self, name, value)

    def _kind(self) -> list[Any]:
        """What a snapshot must agree on to be used."""
        sizes = [[dimension.kind, dimension.size] for dimension in self.dimensions]
        return ["cma_es", type(self._model).__name__, self.seed, self._first_population(), sizes]

    def _begin(self, restart: int) -> None:
        """Set up a search distribution; nothing of the one before is used."""
        start = self._start
        if restart:
            start = uniform_genome(self.dimensions, self.seed, "cma_es", "restart", restart)
        self._restart = restart
        self._model = self._new_model(start, restart)
        self._numbers = self._model.initial()
        self._solutions: list[Any] = []
        self._first = 0
        self._scores: dict[int, float | None] = {}
        self._age = 0  # generations of this restart
        self._best: float | None = None
        self._median: float | None = None
        self._stale = 0  # generations since the best score improved
        self._flat = 0  # generations in a row with equal scores
        self._barren = 0  # generations in a row without any score

    def _new_model(self, start: Genome | None, restart: int) -> Model:
        settings = self.settings
        first = self._first_population()
        growth = math.exp(min(restart * math.log(settings.population_growth), math.log(LARGEST_GROWTH)))
        population = round(first * growth)
        if any(dimension.free and dimension.kind != "real" for dimension in self.dimensions):
            return MixedModel(self.dimensions, population, settings.sigma, start)
        separable = self._free() > settings.separable_above
        if not separable and self._free() > MOST_FULL:
            raise ConfigError(
                f"optimizer.separable_above: a full covariance over {self._free():,} free dimensions takes "
                f"minutes a generation; expected at most {MOST_FULL:,}, got {settings.separable_above:,}"
            )
        return RealModel(
            self.dimensions,
            population,
            settings.sigma,
            start,
            adapt=settings.lr_adapt,
            separable=separable,
        )

    def _free(self) -> int:
        return sum(dimension.free for dimension in self.dimensions)

    def _first_population(self) -> int:
        return self.settings.population or default_population(self._free())

    def _draw(self, index: int) -> tuple[int, Genome] | None:
        if not self._solutions:
            seed = derive(self.seed, "cma_es", self._restart, self._generation) % 2**32
            self._solutions = self._model.sample(self._numbers, seed)
            self._first = index
        place = index - self._first
        if place == self.population:
            return None
        return self._generation, self._model.genome(self._solutions[place])

    def _take(self, index: int, score: float | None) -> None:
        self._scores[index - self._first] = score
        if len(self._scores) == self.population:
            self._end_generation([self._scores[place] for place in range(self.population)])

    def _end_generation(self, scores: list[float | None]) -> None:
        order = sorted(range(len(scores)), key=lambda place: (-_or_worst(scores[place]), place))
        ranked = [self._solutions[place] for place in order]
        self._solutions, self._scores = [], {}
        self._generation += 1
        self._count(scores)
        if self._barren == PATIENCE:
            self.finished = f"all candidates of {PATIENCE} generations in a row failed"
            return
        numbers, reason = self._model.update(self._numbers, ranked)
        if numbers is not None:
            self._numbers = numbers
            self._age += 1
            self._median = median_low(map(_or_worst, scores))
            self._median = self._median if math.isfinite(self._median) else None
        reason = self._reason_to_restart() or reason
        if reason:
            self._renew(reason)

    def _count(self, scores: list[float | None]) -> None:
        good = [score for score in scores if score is not None]
        self._barren = 0 if good else self._barren + 1
        if good:
            self._lowest = min(good) if self._lowest is None else min(self._lowest, *good)
            self._highest = max(good) if self._highest is None else max(self._highest, *good)
        self._flat = self._flat + 1 if len(good) == len(scores) and len(set(good)) == 1 else 0
        if good and max(good) > _or_worst(self._best):
            self._best = max(good)
            self._stale = 0
        else:
            self._stale += 1

    def _reason_to_restart(self) -> str:
        if self._flat == PATIENCE:
            return f"all scores of {PATIENCE} generations in a row were equal"
        wait = self.settings.restart_after or 30 + math.ceil(30 * self._free() / self.population)
        if self._stale >= wait:
            return f"no better candidate for {wait} generations"
        return ""

    def _renew(self, reason: str) -> None:
        if self._highest is not None and self._lowest == self._highest and self._restart + 1 == PATIENCE:
            self.finished = f"every score so far is {self._highest:g}: there is nothing to climb"
            return
        ended = (self._median, self._model.mean(self._numbers))
        if self._age and (self._kept is None or _or_worst(ended[0]) > _or_worst(self._kept[0])):
            self._kept = ended
        barren, population = self._barren, self.population
        self._begin(self._restart + 1)
        self._barren = barren
        self._notes.append(
            f"restart {self._restart} before generation {self._generation}: {reason}; "
            f"population {population} -> {self.population}"
        )


def _or_worst(score: float | None) -> float:
    return -math.inf if score is None else score
