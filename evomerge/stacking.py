"""Recipes with a path as recipes of slices and back, where both say the same."""

from __future__ import annotations

from typing import Any

from evomerge.errors import RecipeError
from evomerge.paths import LayerPath, Slice, Step
from evomerge.recipe import Recipe


def as_path(recipe: Recipe) -> Recipe:
    """Return a recipe of slices with one unscaled source each as one with a path.

    Raises:
        RecipeError: It is another kind of recipe, or its ends come from two sources.
    """
    if recipe.path is not None:
        return recipe
    single = all(len(piece.layers) == 1 for piece in recipe.slices)
    values = {rule.value for source in recipe.sources for rule in source.parameters.get("scale", ())}
    if recipe.method != "passthrough" or not recipe.slices or not single or values != {1.0}:
        raise RecipeError("expected a path, or slices of passthrough with one source each and scale 1")
    spans = [span for piece in recipe.slices for span in piece.layers.items()]
    steps = [Step(source=name, layer=layer) for name, (first, end) in spans for layer in range(first, end)]
    if steps[0].source != steps[-1].source:
        raise RecipeError(
            f'slices: the embedding is of "{steps[0].source}" and the head of "{steps[-1].source}"; a path '
            "takes both of one source"
        )
    sources = [source.model_copy(update={"parameters": {}}) for source in recipe.sources]
    return Recipe(**_kept(recipe), sources=tuple(sources), path=LayerPath(layers=tuple(steps)))


def as_slices(recipe: Recipe) -> Recipe:
    """Return a recipe with a path as one of slices; one without a path as it is.

    Raises:
        RecipeError: It has scales, or its ends are not those of its first and last layer.
    """
    path = recipe.path
    if path is None:
        return recipe
    if path.scaled:
        raise RecipeError("path: slices have no scales; an exported model has them in its weights")
    if {path.layers[0].source, path.layers[-1].source} != {path.end}:
        raise RecipeError(
            f'path: slices take embedding and head of their first and last layer, not of "{path.end}"'
        )
    slices = tuple(Slice(layers={source: (first, end)}) for source, first, end in path.runs)
    sources = sorted(recipe.sources, key=lambda source: source.name != path.end)
    return Recipe(**_kept(recipe), sources=tuple(sources), slices=slices)


def _kept(recipe: Recipe) -> dict[str, Any]:
    changed = ("slices", "path", "sources", "parameters")
    return {key: value for key, value in recipe if key not in changed}
