"""The config of a model whose layers a recipe's slices or path pick, and what makes up such a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.flows import layer_types
from evomerge.checkpoints.layout import Layout
from evomerge.errors import RecipeError
from evomerge.recipe import LayerPath, Recipe
from evomerge.slices import Output, check_slices, outline

__all__ = ["Output", "check_slices", "outline", "outlined_config", "path_config"]


def outlined_config(config: Mapping[str, Any], recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Return a model config with the recipe's number of layers, and what it says by layer in their order.

    Args:
        config: Of the recipe's reference, or the part of it that describes the language model.
        recipe: With or without slices.
        layout: Of the recipe's reference.
    """
    result = dict(config)
    if not recipe.slices:
        return result
    inner = result.get("text_config")
    if isinstance(inner, dict):
        result["text_config"] = outlined_config(inner, recipe, layout)
        return result
    count, order = layout.num_layers, _order(recipe)
    for key, value in config.items():
        if key in BY_LAYER and isinstance(value, list) and len(value) == count:
            result[key] = [value[min(layer, count - 1)] for layer in order]
        elif key in INDICES and isinstance(value, list):
            result[key] = [layer for layer, taken in enumerate(order) if taken in value]
        elif key in COUNTS and value == count:
            result[key] = len(order)
    return result


def path_config(
    configs: Mapping[str, Mapping[str, Any]], path: LayerPath, counts: Mapping[str, int]
) -> dict[str, Any]:
    """Return what changes in the config of a path's ends: its number of layers, and what it says by layer.

    Args:
        configs: Source name to model config.
        path: The path.
        counts: Source name to its number of layers.

    Raises:
        RecipeError: A layer's attention has another window than the config can say.
    """
    own, steps = configs[path.end], path.layers
    full = {name: {**config, "layer_types": layer_types(config)} for name, config in configs.items()}
    changed: dict[str, Any] = {}
    for key, value in full[path.end].items():
        if key in BY_LAYER and isinstance(value, list) and len(value) == counts[path.end]:
            lists = {step.source: full[step.source].get(key) or value for step in steps}
            changed[key] = [lists[s.source][min(s.layer, len(lists[s.source]) - 1)] for s in steps]
        elif key in INDICES and isinstance(value, list):
            taken = [step.layer in (full[step.source].get(key) or ()) for step in steps]
            changed[key] = [number for number, is_taken in enumerate(taken) if is_taken]
        elif key in COUNTS and own.get(key) == counts[path.end]:
            changed[key] = len(steps)
    for number, step in enumerate(steps):
        windows = [configs[name].get("sliding_window") for name in (path.end, step.source)]
        slides = changed.get("layer_types", ["sliding_attention"] * len(steps))[number] == "sliding_attention"
        if slides and windows[0] != windows[1]:
            raise RecipeError(
                f"path.layers.{number}: the attention window of {step.source} is {windows[1]}, but "
                f"{windows[0]} in {path.end}, whose config holds for all layers"
            )
    return changed


def _order(recipe: Recipe) -> list[int]:
    """Return the reference's layer, or the first source's, that each layer of the merged model is made of."""
    name = recipe.reference.name
    firsts = [piece.layers.get(name, next(iter(piece.layers.values())))[0] for piece in recipe.slices]
    return [
        first + offset
        for piece, first in zip(recipe.slices, firsts, strict=True)
        for offset in range(piece.count)
    ]


COUNTS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
"""Keys of a config that hold the number of layers."""

BY_LAYER = frozenset({"layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers"})
"""Keys of a config that hold a list with one entry for each layer."""

INDICES = frozenset({"mlp_only_layers", "moe_layers"})
"""Keys of a config that list the numbers of some layers."""
