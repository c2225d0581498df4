"""What a config can say about each optimizer; checked when made.

Field metadata carries one line for people under `doc`. Importing this loads no optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from evomerge.errors import ConfigError


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one optimizer; the base class of all of them."""

    def __post_init__(self) -> None:
        """Check the types.

        Raises:
            ConfigError: A value has another type than its field.
        """
        hints = get_type_hints(type(self))
        for name in (one.name for one in fields(self)):
            _check_type(name, getattr(self, name), hints[name])


@dataclass(frozen=True, kw_only=True)
class RandomSettings(Settings):
    """Settings of `random`: none."""


@dataclass(frozen=True, kw_only=True)
class CmaEsSettings(Settings):
    """Settings of `cma_es`."""

    population: int | None = _setting(
        None, "candidates per generation, 2 or more; default 4 + floor(3 ln(free dimensions))"
    )
    sigma: float = _setting(1 / 6, "initial step as a share of each dimension's range, in (0, 1]")
    lr_adapt: bool = _setting(
        True,
        "adapt the learning rate to the noise (arXiv 2304.03473); only full-covariance real spaces have it",
    )
    separable_above: int = _setting(
        100, "from more free dimensions than this on, a real space gets a diagonal covariance"
    )
    restart_after: int | None = _setting(
        None,
        "generations without a better best candidate before a restart; "
        "default 30 + ceil(30 * free dimensions / population)",
    )
    population_growth: float = _setting(
        2.0, "factor on the population at each restart, 1 or more; it grows to at most 8 times the first"
    )

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        _check("population", self.population, self.population is None or self.population >= 2, "2 or more")
        _check("sigma", self.sigma, 0 < self.sigma <= 1, "above 0 and at most 1")
        _check("separable_above", self.separable_above, self.separable_above >= 0, "0 or more")
        waits = self.restart_after
        _check("restart_after", waits, waits is None or waits >= 1, "1 or more")
        growth = self.population_growth
        _check("population_growth", growth, growth >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class OptunaSettings(Settings):
    """Settings of `optuna`."""

    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "qmc"] = _setting(
        "tpe", "which of Optuna's samplers proposes"
    )
    startup: int | None = _setting(
        None, "scored candidates before the model is used (tpe, gp: default 10; cmaes: default 1)"
    )
    population: int | None = _setting(
        None, "candidates per internal generation, 2 or more (nsga2: default 50; cmaes: its own default)"
    )
    multivariate: bool | None = _setting(None, "tpe: model dimensions jointly; default true")
    constant_liar: bool | None = _setting(None, "tpe: keep away from outstanding candidates; default true")
    sequence: Literal["sobol", "halton"] | None = _setting(
        None, "qmc: which scrambled sequence; default sobol"
    )

    def __post_init__(self) -> None:
        """Check types, ranges, and that each setting belongs to the sampler.

        Raises:
            ConfigError: A value is out of range, or has no effect with this sampler.
        """
        super().__post_init__()
        _check("startup", self.startup, self.startup is None or self.startup >= 1, "1 or more")
        _check("population", self.population, self.population is None or self.population >= 2, "2 or more")
        users = {
            "startup": ("tpe", "gp", "cmaes"),
            "population": ("nsga2", "cmaes"),
            "multivariate": ("tpe",),
            "constant_liar": ("tpe",),
            "sequence": ("qmc",),
        }
        for name, samplers in users.items():
            if getattr(self, name) is not None and self.sampler not in samplers:
                only = ", ".join(samplers)
                raise ConfigError(
                    f"optimizer.{name}: has no effect with sampler {self.sampler}, only with {only}"
                )


@dataclass(frozen=True, kw_only=True)
class NichesSettings(Settings):
    """Settings of `niches`."""

    archive: Literal["niches", "map_elites"] = _setting(
        "niches", "who lives: the fittest of a fixed number, or MAP-Elites' grid over the tasks' scores"
    )
    size: int = _setting(15, "individuals in the archive, 2 or more (niches only)")
    grid: int = _setting(4, "cells along each task's scores, 2 or more (map_elites only)")
    warm_up: int | None = _setting(
        None, "candidates before the first child; until then founders and their merges; default size"
    )
    alpha: float = _setting(
        1.0, "how strongly rivals for a document count: 0 not at all (a genetic algorithm), 1 they share it"
    )
    competition: Literal["shared", "none"] = _setting(
        "shared", "fitness: every document shared among its solvers, or the plain score (a genetic algorithm)"
    )
    attraction: bool = _setting(True, "draw the second parent by what it adds to the first")
    crossover: bool = _setting(True, "off: a child is a mutated copy of one parent")
    split_point: bool = _setting(True, "off: a child lies at one mixing ratio as a whole")
    slerp_angle: Literal["global", "per_segment", "none"] | None = _setting(
        None,
        "segments are mixed along a great circle by the angle of the whole parents or of each part, or along "
        "a straight line; default global",
    )
    mutation: float | None = _setting(
        None, "standard deviation of mutations in shares of a range; default 0.05, in a space of segments 0"
    )
    documents: Literal["by_task", "equal"] = _setting(
        "by_task", "weight of a document: its task's weight over the task's documents, or all alike"
    )
    founders: str | None = _setting(
        None, "file of `evomerge population export`, whose individuals are founders too"
    )

    def __post_init__(self) -> None:
        """Check types, ranges, and that each setting has an effect.

        Raises:
            ConfigError: A value is out of range, or belongs to another archive.
        """
        super().__post_init__()
        _check("size", self.size, self.size >= 2, "2 or more")
        _check("grid", self.grid, self.grid >= 2, "2 or more")
        _check("warm_up", self.warm_up, self.warm_up is None or self.warm_up >= 0, "0 or more")
        _check("alpha", self.alpha, self.alpha >= 0, "0 or more")
        _check("mutation", self.mutation, self.mutation is None or self.mutation >= 0, "0 or more")
        plain = {"alpha": 1.0, "competition": "shared", "attraction": True}
        changed = [name for name, usual in plain.items() if getattr(self, name) != usual]
        if self.archive == "map_elites" and changed:
            raise ConfigError(f"optimizer.{changed[0]}: has no effect with archive map_elites")
        if self.competition == "none" and self.alpha != 1.0:
            raise ConfigError("optimizer.alpha: has no effect with competition none")


def _check(name: str, value: object, good: bool, must: str) -> None:
    if not good:
        raise ConfigError(f"optimizer.{name}: must be {must}, got {value}")


def _check_type(name: str, value: object, hint: Any) -> None:
    choices = [
        choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)
    ]
    parts = {part for part in (hint, *get_args(hint)) if isinstance(part, type)}
    if value is None and type(None) in parts:
        return
    if choices:
        _check(name, repr(value), value in choices, f"one of {', '.join(choices)}")
    elif float in parts:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _check(name, repr(value), number, "a finite number")
    elif str in parts:
        _check(name, repr(value), isinstance(value, str) and bool(value), "a text")
    elif bool in parts:
        _check(name, repr(value), isinstance(value, bool), "true or false")
    else:
        _check(name, repr(value), type(value) is int, "a whole number")
