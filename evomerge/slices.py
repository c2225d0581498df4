"""Which tensors a recipe's model has, and which tensors of the sources each is merged from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, Slice
from evomerge.records import Place


class Layered(Protocol):
    """What is to be known of the sources' layout."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def places(self) -> Mapping[str, Place]:
        """The place of every tensor, in the checkpoint's order."""

    def of_layer(self, name: str, layer: int) -> str:
        """Return the name that a layer's tensor has in another layer."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged model.

    Attributes:
        place: Where it sits in the merged model; its name there.
        inputs: Name of each source that takes part (the base too) to the tensor's name in that source.
    """

    place: Place
    inputs: Mapping[str, str]


def outline(recipe: Recipe, layout: Layered) -> dict[str, Output]:
    """Return the merged model's tensors by name, in their order.

    A layer of a slice has the tensors that the reference has in the layer it is made of; where the reference
    takes no part in the slice, those that it has in the layer of the first source's number. A path counts as
    one slice for each of its layers.

    Args:
        recipe: With slices, a path, or neither.
        layout: Of the recipe's reference; all sources name their tensors like it.

    Raises:
        RecipeError: A slice asks for a layer of the reference that it does not have.
    """
    stack = recipe.stack
    if not stack:
        names = [ref.name for ref in recipe.refs]
        return {name: Output(place, dict.fromkeys(names, name)) for name, place in layout.places.items()}
    check_slices(recipe, {recipe.reference.name: layout.num_layers})
    outside = [place for place in layout.places.values() if place.layer is None]
    layers: list[list[Place]] = [[] for _ in range(layout.num_layers)]
    for place in layout.places.values():
        if place.layer is not None:
            layers[place.layer].append(place)
    last = len(stack) - 1
    total = sum(piece.count for piece in stack)
    first_end, last_end = stack[0], stack[last]
    if recipe.path is not None:
        first_end = last_end = Slice(layers={recipe.path.end: (0, 1)})
    outputs = [_end(place, first_end, 0, 0.0) for place in outside if place.depth == 0.0]
    layer = 0
    for i, piece in enumerate(stack):
        first = piece.layers.get(recipe.reference.name, next(iter(piece.layers.values())))[0]
        for offset in range(piece.count):
            depth, own = layer / max(1, total - 1), offset / max(1, piece.count - 1)
            # A source may have more layers than the reference; they have the tensors of the last one.
            model = layers[min(first + offset, layout.num_layers - 1)]
            outputs += [
                Output(
                    Place(layout.of_layer(place.name, layer), place.role, layer, depth, i, own),
                    _inputs(piece, layout, place.name, offset),
                )
                for place in model
            ]
            layer += 1
    outputs += [_end(place, last_end, last, 1.0) for place in outside if place.depth != 0.0]
    return {output.place.name: output for output in outputs}


def _end(place: Place, piece: Slice, index: int, own: float) -> Output:
    inputs = dict.fromkeys(piece.layers, place.name)
    return Output(replace(place, slice=index, slice_depth=own), inputs)


def _inputs(piece: Slice, layout: Layered, name: str, offset: int) -> dict[str, str]:
    return {source: layout.of_layer(name, first + offset) for source, (first, _) in piece.layers.items()}


def check_slices(recipe: Recipe, layers: Mapping[str, int]) -> None:
    """Raise RecipeError unless every source has the layers that the slices ask for.

    Args:
        recipe: With slices, a path, or neither.
        layers: Source name to its number of layers; sources that are not named are not looked at.
    """
    for i, step in enumerate(recipe.path.layers if recipe.path else ()):
        count = layers.get(step.source, step.layer + 1)
        if step.layer >= count:
            raise RecipeError(
                f"path.layers.{i}: {step.source} has the layers 0 to {count - 1}, got layer {step.layer}"
            )
    for i, piece in enumerate(recipe.slices):
        for name, (first, end) in piece.layers.items():
            if end > layers.get(name, end):
                raise RecipeError(
                    f"slices.{i}.layers.{name}: expected layers within [0, {layers[name]}], "
                    f"got [{first}, {end}]"
                )
