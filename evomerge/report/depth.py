"""A recipe's parameters over depth, as plain data for tables and drawings."""

from __future__ import annotations

from typing import Any

from evomerge.recipe import Recipe
from evomerge.rules import Rule

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


def steps(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the layers of a path in the order in which it runs through them; none of a plain merge."""
    if recipe.path is None:
        return []
    return [{"source": step.source, "layer": step.layer, "scale": step.scale} for step in recipe.path.layers]


def _tensors(rule: Rule, alone: bool) -> str:
    if rule.general:
        return "all tensors" if alone else "other tensors"
    return " ".join(part for part in (rule.role, f'"{rule.match}"' if rule.match else None) if part)
