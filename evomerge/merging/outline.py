"""Which tensors a recipe's model has, and which tensors of the sources each is merged from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.checkpoints.layout import Layout
from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, Slice
from evomerge.records import Place


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged model.

    Attributes:
        place: Where it sits in the merged model; its name there.
        inputs: Name of each source that takes part (the base too) to the tensor's name in that source.
    """

    place: Place
    inputs: Mapping[str, str]


def outline(recipe: Recipe, layout: Layout) -> dict[str, Output]:
    """Return the merged model's tensors by name, in their order.

    Args:
        recipe: With or without slices.
        layout: Of the recipe's reference; all sources name their tensors like it.

    Raises:
        RecipeError: A slice asks for a layer that the reference does not have.
    """
    if not recipe.slices:
        names = [ref.name for ref in recipe.refs]
        return {name: Output(place, dict.fromkeys(names, name)) for name, place in layout.places.items()}
    outside = [place for place in layout.places.values() if place.layer is None]
    within = [place for place in layout.places.values() if place.layer == 0]
    last = len(recipe.slices) - 1
    total = sum(piece.count for piece in recipe.slices)
    outputs = [_end(place, recipe.slices[0], 0, 0.0) for place in outside if place.depth == 0.0]
    layer = 0
    for i, piece in enumerate(recipe.slices):
        for offset in range(piece.count):
            depth, own = layer / max(1, total - 1), offset / max(1, piece.count - 1)
            outputs += [_moved(place, layout, piece, offset, layer, depth, i, own) for place in within]
            layer += 1
    outputs += [_end(place, recipe.slices[last], last, 1.0) for place in outside if place.depth != 0.0]
    return {output.place.name: output for output in outputs}


def _end(place: Place, piece: Slice, index: int, depth: float) -> Output:
    inputs = dict.fromkeys(piece.layers, place.name)
    return Output(replace(place, slice=index, slice_depth=depth), inputs)


def _moved(
    place: Place, layout: Layout, piece: Slice, offset: int, layer: int, depth: float, index: int, own: float
) -> Output:
    inputs = {name: layout.of_layer(place.name, first + offset) for name, (first, _) in piece.layers.items()}
    named = layout.of_layer(place.name, layer)
    return Output(Place(named, place.role, layer, depth, index, own), inputs)


def check_slices(recipe: Recipe, layers: Mapping[str, int]) -> None:
    """Raise RecipeError unless every source has the layers that the slices ask for.

    Args:
        recipe: With or without slices.
        layers: Source name to its number of layers.
    """
    for i, piece in enumerate(recipe.slices):
        for name, (first, end) in piece.layers.items():
            if end > layers[name]:
                raise RecipeError(
                    f"slices.{i}.layers.{name}: expected layers within [0, {layers[name]}], "
                    f"got [{first}, {end}]"
                )


def outlined_config(config: Mapping[str, Any], recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Return a model config with the recipe's number of layers, and its lists by layer put in their order."""
    result = dict(config)
    inner = result.get("text_config")
    if isinstance(inner, dict):
        result["text_config"] = outlined_config(inner, recipe, layout)
        return result
    if not recipe.slices:
        return result
    name = recipe.reference.name
    order = [
        first + offset
        for piece in recipe.slices
        for first in [piece.layers.get(name, next(iter(piece.layers.values())))[0]]
        for offset in range(piece.count)
    ]
    count = layout.num_layers
    for key, value in result.items():
        if isinstance(value, list) and len(value) == count and key in BY_LAYER:
            result[key] = [value[min(layer, count - 1)] for layer in order]
        elif key in COUNTS and value == count:
            result[key] = len(order)
    return result


COUNTS = frozenset({"num_hidden_layers", "n_layer", "num_layers", "n_layers"})
"""Keys of a config that hold the number of layers."""

BY_LAYER = frozenset({"layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers"})
"""Keys of a config that hold a list with one entry for each layer."""
