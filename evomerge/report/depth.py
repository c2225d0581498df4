"""A recipe's parameters over depth, as plain data for tables and drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.recipe import Recipe
from evomerge.rules import Rule
from evomerge.segments import pieces

WHOLE = "merge"
"""The owner of parameters that belong to no source."""


def by_parameter(recipe: Recipe) -> dict[tuple[str, str], dict[str, Rule]]:
    """Return the rules of every parameter and group of tensors by owner: a source, or the whole merge."""
    found: dict[tuple[str, str], dict[str, Rule]] = {}
    owners = [(source.name, source.parameters) for source in recipe.sources]
    for owner, settings in (*owners, (WHOLE, recipe.parameters)):
        for parameter, setting in settings.items():
            for rule in setting:
                key = (parameter, _tensors(rule, len(setting) == 1))
                found.setdefault(key, {}).setdefault(owner, rule)
    return found


def over_depth(recipe: Recipe, layers: int) -> list[dict[str, Any]]:
    """Return for every parameter its values, owner by owner.

    Args:
        recipe: A merge; of a layer path, what it runs through.
        layers: Number of layers.

    Returns:
        `parameter`, `tensors`, and `values`: owner to one value for each layer, or to one value alone.
    """
    depths = [layer / (layers - 1) for layer in range(layers)] if layers > 1 else [0.0]

    def values(rule: Rule) -> Any:
        return [rule.at(depth) for depth in depths] if isinstance(rule.value, tuple) else rule.value

    return [
        {
            "parameter": parameter,
            "tensors": tensors,
            "values": {owner: values(rule) for owner, rule in rules.items()},
        }
        for (parameter, tensors), rules in by_parameter(recipe).items()
    ]


def merge_map(recipe: Recipe, chromosomes: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Return for each table of a recipe its sources' mean coefficients along depth.

    Args:
        recipe: With segments.
        chromosomes: The run's facts: for each table layer, role and entries of its tensors.
        layers: Number of layers.

    Returns:
        For each table `title`, `by_layer` (layers, sources; NaN where it has no tensor), and `outside`, role
        to one number per source.
    """
    found: list[dict[str, Any]] = []
    for table, chromosome in zip(recipe.segments, chromosomes, strict=True):
        sums = np.zeros((layers, len(recipe.sources)))
        counts = np.zeros(layers)
        outside: dict[str, Any] = {}
        start = 0
        for layer, role, size in chromosome["tensors"]:
            rows = [(p.stop - p.start) * np.array(p.coefficients) for p in pieces(table, start, size)]
            start += size
            mixed = np.sum(rows, axis=0)
            if layer is None:
                before = outside.get(role, (np.zeros(len(recipe.sources)), 0))
                outside[role] = (before[0] + mixed, before[1] + size)
            else:
                sums[layer] += mixed
                counts[layer] += size
        with np.errstate(invalid="ignore"):
            by_layer = sums / counts[:, None]
        title = "coefficient, " + (" and ".join(table.roles) or ("other tensors" if found else "all tensors"))
        ends = {role: (total / size).tolist() for role, (total, size) in outside.items()}
        found.append({"title": title, "by_layer": by_layer, "outside": ends})
    return found


def segments_over_depth(
    recipe: Recipe, chromosomes: Sequence[Mapping[str, Any]], layers: int
) -> list[dict[str, Any]]:
    """Return the mean coefficients of a recipe with segments in the shape of `over_depth`.

    Layers in which a table has no tensor have None. Empty where the run's facts do not fit the recipe.
    """
    if len(chromosomes) != len(recipe.segments):
        return []
    names = [source.name for source in recipe.sources]
    found = []
    for table in merge_map(recipe, chromosomes, layers):
        columns = [[None if np.isnan(v) else float(v) for v in column] for column in table["by_layer"].T]
        rows = [(table["title"].removeprefix("coefficient, "), columns), *table["outside"].items()]
        found += [
            {"parameter": "coefficient", "tensors": tensors, "values": dict(zip(names, values, strict=True))}
            for tensors, values in rows
        ]
    return found


def steps(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the layers of a path in the order in which it runs through them; none of a plain merge."""
    if recipe.path is None:
        return []
    return [{"source": step.source, "layer": step.layer, "scale": step.scale} for step in recipe.path.layers]


def _tensors(rule: Rule, alone: bool) -> str:
    if rule.general:
        return "all tensors" if alone else "other tensors"
    return " ".join(part for part in (rule.role, f'"{rule.match}"' if rule.match else None) if part)
