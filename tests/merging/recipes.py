"""Recipes over tiny checkpoints, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.catalogue import CATALOGUE, Parameter
from evomerge.checkpoints.source import Checkpoint
from evomerge.recipe import Recipe, parse_recipe
from tests.checkpoints.tiny import make_model

METHODS = tuple(CATALOGUE)


def models(folder: Path, model_type: str = "llama", count: int = 3, **options: Any) -> dict[str, Checkpoint]:
    """Make `base`, `a`, `b`, ... of one type with different weights, and open them."""
    names = ["base", *"abcdefg"][: count + 1]
    return {
        name: Checkpoint.open(make_model(folder / name, model_type, seed=seed, **options))
        for seed, name in enumerate(names)
    }


def recipe_of(
    method: str,
    checkpoints: Mapping[str, Checkpoint],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    fingerprints: bool = True,
    **more: Any,
) -> Recipe:
    """Return a recipe over checkpoints as `models` makes them.

    Args:
        method: Takes the first two sources if it takes no more.
        checkpoints: `base` and the sources.
        parameters: Parameters by source name; the method's own under the name `method`.
        fingerprints: Whether sources are identified by their content.
        more: Other keys of the recipe.
    """
    entry, given = CATALOGUE[method], dict(parameters or {})
    refs = {
        name: {"name": name, "path": str(checkpoint.path)}
        | ({"fingerprint": checkpoint.fingerprint} if fingerprints else {})
        for name, checkpoint in checkpoints.items()
    }
    names = [name for name in checkpoints if name != "base"][: entry.max_sources]
    defaults: dict[str, Any] = {"t": 0.3} if method == "slerp" else {}
    data: dict[str, Any] = {
        "method": method,
        "sources": [{**refs[name], "parameters": given.get(name, {})} for name in names],
        "parameters": {**defaults, **given.get("method", {})},
        **({"base": refs["base"]} if entry.needs_base else {}),
    }
    return parse_recipe({**data, **more}, "test")


OWN: dict[str, dict[str, Any]] = {
    "layer_swap": {"bottom": 1.0, "top": 0.0, "transition": 1.0},
    "model_stock": {"clamp": False},
    "doge": {"steps": 20.0},
    "optmerge": {"steps": 20.0},
    "wudi": {"steps": 20.0},
}
"""Parameters of the method that make it do what it does on a model of a few layers, quickly."""

LEFT_ALONE = frozenset(
    {"lines_alpha", "lines_beta", "eps", "tol", "max_iter", "steps", "subspace", "rank", "agreement"}
)


def usual(method: str, checkpoints: Mapping[str, Checkpoint], shift: float = 0.0, **more: Any) -> Recipe:
    """Return a recipe with unremarkable parameters, others for another `shift` (up to 0.5)."""
    numbers = [p for p in CATALOGUE[method].parameters if not p.choices and p.name not in LEFT_ALONE]
    names = [name for name in checkpoints if name != "base"]

    def within(parameter: Parameter, place: float) -> float:
        low, high = parameter.low or 0.0, parameter.high or 1.0
        return low + min(max(place, 0.0), 1.0) * (high - low)

    def of_source(parameter: Parameter, i: int) -> float:
        if parameter.name == "weight":
            return 0.3 + 0.2 * i + shift
        return within(parameter, 0.7 - 0.1 * i - shift / 2)

    values = {
        name: {p.name: of_source(p, i) for p in numbers if p.scope == "source"}
        for i, name in enumerate(names)
    }
    own = {p.name: within(p, 0.3 + shift) for p in numbers if p.scope == "method"}
    return recipe_of(method, checkpoints, {**values, "method": {**own, **OWN.get(method, {})}}, **more)


def by_identity(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the recipe's checkpoints as a merger wants them."""
    return {ref.identity: checkpoints[ref.name] for ref in recipe.refs}
