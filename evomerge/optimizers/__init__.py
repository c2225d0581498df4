"""Optimizers: what proposes the next candidates. Each is loaded only when it is made."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError, nearest
from evomerge.optimizers.base import Optimizer, StateError
from evomerge.optimizers.settings import (
    CmaEsSettings,
    NichesSettings,
    OptunaSettings,
    RandomSettings,
    Settings,
)
from evomerge.records import Genome
from evomerge.spaces.dimensions import Dimension

__all__ = ["OPTIMIZERS", "SETTINGS", "Optimizer", "StateError", "create", "settings_of"]

OPTIMIZERS: dict[str, str] = {
    "cma_es": "evomerge.optimizers.cma_es:CmaEs",
    "niches": "evomerge.optimizers.niches:Niches",
    "optuna": "evomerge.optimizers.optuna_samplers:OptunaSampler",
    "random": "evomerge.optimizers.random_search:RandomSearch",
}
"""Name -> `module:class`; a class takes `(dimensions, seed, settings, start)`."""

SETTINGS: dict[str, type[Settings]] = {
    "cma_es": CmaEsSettings,
    "niches": NichesSettings,
    "optuna": OptunaSettings,
    "random": RandomSettings,
}


def settings_of(name: str) -> type[Settings]:
    """Return the optimizer's settings: a frozen dataclass whose fields carry metadata `doc`.

    Raises:
        ConfigError: There is no optimizer of that name.
    """
    try:
        return SETTINGS[name]
    except KeyError:
        raise ConfigError(f'optimizer.name: unknown optimizer "{name}"{nearest(name, SETTINGS)}') from None


def create(
    name: str,
    dimensions: Sequence[Dimension],
    seed: int,
    settings: Mapping[str, Any] | None = None,
    start: Genome | None = None,
    **more: Any,
) -> Optimizer:
    """Return a new optimizer.

    Args:
        name: A key of `OPTIMIZERS`.
        dimensions: What it varies.
        seed: Root of its random streams.
        settings: By field name of `settings_of(name)`; what is missing has its default.
        start: The genome to begin from: the initial mean of `cma_es`, the first proposal of the others.
        more: What only this optimizer takes; see its class.

    Raises:
        ConfigError: The optimizer or a setting is unknown, out of range, or does not fit the dimensions.
        ValueError: `start` is no genome of these dimensions.
    """
    known = settings_of(name)
    names = [one.name for one in dataclasses.fields(known)]
    for given in settings or {}:
        if given not in names:
            raise ConfigError(f'optimizer.{given}: unknown setting of "{name}"{nearest(given, names)}')
    module, _, kind = OPTIMIZERS[name].partition(":")
    made: Optimizer = getattr(importlib.import_module(module), kind)(
        dimensions, seed, known(**(settings or {})), start, **more
    )
    return made
