"""The search distributions of the `cmaes` library, as pure functions of their numbers.

A library object lives for one call: it is built from the distribution's numbers, used, and its numbers are
read back. So nothing that its own snapshots leave out (generator, caches, uninitialised memory) can make a
resumed run differ from an uninterrupted one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import cmaes
import numpy as np

from evomerge.records import Genome
from evomerge.spaces.dimensions import Dimension

Numbers = dict[str, Any]
"""What changes from generation to generation, by attribute name of the library's class."""

SMALLEST_STEP = 1e-8
"""Below this standard deviation in every real dimension of the unit box a search has converged."""

LARGEST_STEP = 10.0
"""Above this standard deviation in a real dimension of the unit box a search has diverged."""

LARGEST_CONDITION = 1e14
"""Above this condition number of the covariance its eigenvectors are noise."""


class Model(ABC):
    """A search distribution with fixed dimensions, population, initial step and start.

    Args:
        dimensions: What to vary; those with one value are left at 0.
        population: Candidates per generation, at least 2.
        sigma: Initial standard deviation as a share of each range.
        start: Initial mean; None: the centre, and equal chances for all categories.
    """

    varying: tuple[str, ...] = ()

    def __init__(
        self, dimensions: Sequence[Dimension], population: int, sigma: float, start: Genome | None
    ) -> None:
        self.dimensions = tuple(dimensions)
        self.population = population
        self.sigma = sigma
        self.start = start
        # Two ordered values are two categories: cmaes asks for binary dimensions as categories.
        self.reals = [i for i, one in enumerate(dimensions) if one.kind == "real"]
        self.integers = [i for i, one in enumerate(dimensions) if one.kind == "integer" and one.size > 2]
        taken = {*self.reals, *self.integers}
        self.categories = [i for i, one in enumerate(dimensions) if one.free and i not in taken]

    def initial(self) -> Numbers:
        """Return the numbers of the first generation."""
        return self._numbers(self._new())

    def sample(self, numbers: Numbers, seed: int) -> list[Any]:
        """Return one generation of library solutions drawn with a seed in [0, 2**32)."""
        library = self._load(numbers)
        library.reseed_rng(seed)
        with np.errstate(all="ignore"):
            return [library.ask() for _ in range(self.population)]

    def update(self, numbers: Numbers, ranked: Sequence[Any]) -> tuple[Numbers | None, str]:
        """Return the next generation's numbers, and why the search should stop here.

        Args:
            numbers: This generation's numbers.
            ranked: All its solutions, best first.

        Returns:
            The new numbers, None if they are not finite; and the reason to stop, empty to go on.
        """
        library = self._load(numbers)
        try:
            with np.errstate(all="ignore"):
                library.tell([(solution, float(rank)) for rank, solution in enumerate(ranked)])
                updated = self._numbers(library)
                if not all(np.all(np.isfinite(value)) for value in updated.values()):
                    return None, "numerical breakdown"
                return updated, self._reason_to_stop(library)
        except np.linalg.LinAlgError:
            return None, "numerical breakdown"

    def check(self, numbers: Numbers) -> None:
        """Raise ValueError unless these are finite numbers of this model's names and shapes."""
        expected = self.initial()
        if numbers.keys() != expected.keys():
            raise ValueError(f"numbers named {sorted(numbers)}, expected {sorted(expected)}")
        for name, value in numbers.items():
            like = expected[name]
            if isinstance(like, np.ndarray):
                alike = isinstance(value, np.ndarray) and (value.shape, value.dtype) == (
                    like.shape,
                    like.dtype,
                )
            else:
                alike = isinstance(value, list) if isinstance(like, list) else type(value) in (int, float)
            if not alike or not np.all(np.isfinite(value)):
                raise ValueError(f"{name} is not finite or of another type or shape")

    @abstractmethod
    def genome(self, solution: Any) -> Genome:
        """Return the genome of a library solution."""

    @abstractmethod
    def mean(self, numbers: Numbers) -> Genome:
        """Return the distribution's mean as a genome: clipped, rounded, most likely category."""

    @abstractmethod
    def _new(self) -> Any:
        """Return a library object at the start of the search."""

    @abstractmethod
    def _reason_to_stop(self, library: Any) -> str: ...

    def _load(self, numbers: Mapping[str, Any]) -> Any:
        library = self._new()
        for name, value in numbers.items():
            setattr(library, name, value.copy() if isinstance(value, (np.ndarray, list)) else value)
        return library

    def _numbers(self, library: Any) -> Numbers:
        return {name: _plain(getattr(library, name)) for name in self.varying}

    def _genome(self, reals: Sequence[float], integers: Sequence[float], categories: Sequence[int]) -> Genome:
        genome = [0.0] * len(self.dimensions)
        for places, values in (
            (self.reals, reals),
            (self.integers, integers),
            (self.categories, categories),
        ):
            for place, value in zip(places, values, strict=True):
                genome[place] = float(value)
        return tuple(genome)

    def _gaussian_reason(self, library: Any, real_steps: np.ndarray) -> str:
        # The library's own limit compares sqrt(condition) with 1e14.
        stops = library.should_stop()
        condition = (float(np.max(library._D)) / float(np.min(library._D))) ** 2
        if not condition <= LARGEST_CONDITION:
            return f"the covariance's condition number exceeds {LARGEST_CONDITION:g}"
        if len(real_steps) and float(np.max(real_steps)) < SMALLEST_STEP:
            return f"converged: every step is below {SMALLEST_STEP:g} of its range"
        if len(real_steps) and float(np.max(real_steps)) > LARGEST_STEP:
            return f"diverged: a step exceeds {LARGEST_STEP:g} times its range"
        return "a termination rule of cmaes" if stops else ""


class RealModel(Model):
    """CMA-ES over real dimensions (arXiv 1604.00772).

    Args:
        adapt: Adapt the learning rate (arXiv 2304.03473); without effect if separable.
        separable: Keep only the covariance's diagonal (doi 10.1007/978-3-540-87700-4_30).
        dimensions, population, sigma, start: See `Model`.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        population: int,
        sigma: float,
        start: Genome | None,
        *,
        adapt: bool,
        separable: bool,
    ) -> None:
        super().__init__(dimensions, population, sigma, start)
        self.adapt = adapt
        self.separable = separable and len(self.reals) > 1  # SepCMA refuses one dimension
        self.varying = ("_mean", "_sigma", "_C", "_p_sigma", "_pc", "_g")
        if adapt and not self.separable:
            self.varying += ("_Emean", "_ESigma", "_Vmean", "_VSigma", "_eta_mean", "_eta_Sigma")

    def genome(self, solution: Any) -> Genome:
        """Return the genome of a sampled vector, which lies in the box."""
        return self._genome(solution, (), ())

    def mean(self, numbers: Numbers) -> Genome:
        """Return the mean, clipped to the box."""
        return self._genome(np.clip(numbers["_mean"], 0.0, 1.0), (), ())

    def _new(self) -> Any:
        mean = np.array([0.5 if self.start is None else self.start[i] for i in self.reals])
        kind = cmaes.SepCMA if self.separable else cmaes.CMA
        extra = {} if self.separable else {"lr_adapt": self.adapt}
        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        # Populations of 2 and 3 divide by a zero learning rate, and the infinity drops out of a minimum.
        with np.errstate(divide="ignore"):
            library = kind(mean, self.sigma, bounds, seed=0, population_size=self.population, **extra)
        _fill_history(library)
        return library

    def _reason_to_stop(self, library: Any) -> str:
        variances = library._C if self.separable else np.diag(library._C)
        return self._gaussian_reason(library, library._sigma * np.sqrt(variances))


class MixedModel(Model):
    """CatCMA with margin over real, integer and categorical dimensions (arXiv 2504.07884).

    A start gets half of each categorical dimension's chances; the other half is spread over all categories.
    """

    def __init__(
        self, dimensions: Sequence[Dimension], population: int, sigma: float, start: Genome | None
    ) -> None:
        super().__init__(dimensions, population, sigma, start)
        self.gaussian = [*self.reals, *self.integers]
        gaussian = ("_mean", "_sigma", "_C", "_p_sigma", "_pc", "_A", "_iqhist_values")
        self.varying = (
            "_g",
            *(gaussian if self.gaussian else ()),
            *(("_pmut",) if self.integers else ()),
            *(("_q", "_Delta", "_delta", "_gamma", "_s") if self.categories else ()),
        )

    def genome(self, solution: Any) -> Genome:
        """Return the genome of a `CatCMAwM.Solution`."""
        chosen = () if solution.c is None else np.argmax(solution.c, axis=1)
        return self._genome(
            () if solution.x is None else solution.x, () if solution.z is None else solution.z, chosen
        )

    def mean(self, numbers: Numbers) -> Genome:
        """Return the mean: reals clipped, integers rounded, the likeliest categories."""
        reals, integers = np.split(np.asarray(numbers.get("_mean", ())), [len(self.reals)])
        tops = [self.dimensions[i].size - 1 for i in self.integers]
        likeliest = np.argmax(numbers["_q"], axis=1) if self.categories else ()
        return self._genome(np.clip(reals, 0.0, 1.0), np.clip(np.rint(integers), 0, tops), likeliest)

    def _new(self) -> Any:
        sizes = [self.dimensions[i].size for i in self.categories]
        spaces: dict[str, Any] = {"population_size": self.population, "seed": 0}
        if self.reals:
            spaces["x_space"] = [[0.0, 1.0]] * len(self.reals)
        if self.integers:
            spaces["z_space"] = [list(range(self.dimensions[i].size)) for i in self.integers]
        if sizes:
            spaces |= {"c_space": sizes, "cat_param": self._chances(sizes)}
        if self.gaussian:
            # The library's default covariance is singular where the mean lies on a bound.
            ranges = np.array([max(self.dimensions[i].size - 1, 1) for i in self.gaussian], dtype=float)
            mean = ranges / 2 if self.start is None else np.array([self.start[i] for i in self.gaussian])
            spaces |= {"mean": mean, "sigma": self.sigma, "cov": np.diag(ranges**2)}
        with np.errstate(divide="ignore"):  # as in RealModel
            library = cmaes.CatCMAwM(**spaces)
        if self.gaussian:
            _fill_history(library)
        return library

    def _chances(self, sizes: Sequence[int]) -> np.ndarray:
        chances = np.zeros((len(sizes), max(sizes)))
        for row, (place, size) in enumerate(zip(self.categories, sizes, strict=True)):
            chances[row, :size] = 1 / size
            if self.start is not None:
                chances[row, :size] /= 2
                chances[row, int(self.start[place])] += 0.5
        return chances

    def _reason_to_stop(self, library: Any) -> str:
        if not self.gaussian:
            return ""
        count = len(self.reals)
        steps = library._sigma * library._A[:count] * np.sqrt(np.diag(library._C)[:count])
        return self._gaussian_reason(library, steps)


def default_population(free: int) -> int:
    """Return 4 + floor(3 ln(free dimensions)), equation 48 of arXiv 1604.00772."""
    return 4 + math.floor(3 * math.log(free))


def _fill_history(library: Any) -> None:
    # Uninitialised in the library; ranks 0..population-1 are all that is ever told.
    library._funhist_values[:] = np.resize([0.0, library.population_size - 1.0], len(library._funhist_values))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.array(value, order="C")
    if isinstance(value, list):
        return [float(one) for one in value]
    return value if type(value) is int else float(value)
