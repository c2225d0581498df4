"""The scales of a layer path, folded into the weights of a plain model; see `checkpoints.flows`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.checkpoints.flows import Flow, flow_of
from evomerge.checkpoints.layout import Layout
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.paths import LayerPath
from evomerge.recipe import Recipe
from evomerge.records import Place


def check_path(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Check that models of this family can have the recipe's path.

    Args:
        recipe: With or without a path.
        checkpoints: Source name to checkpoint.

    Raises:
        RecipeError: The family is not supported, or cannot have scales; with the nearest path it can have.
    """
    if recipe.path is not None:
        check_scales(recipe.path, flow_of(checkpoints[recipe.path.end].config))


def check_scales(path: LayerPath, flow: Flow) -> None:
    """Raise RecipeError if a path has scales that the family cannot fold."""
    if path.scaled and flow.unscalable:
        number = next(i for i, step in enumerate(path.layers) if step.scale != 1.0)
        raise RecipeError(
            f"path.layers.{number}: scales cannot be folded into models of this family: {flow.unscalable}; "
            "the nearest plain model is the same path without scales"
        )


def folded(tensor: Tensor, place: Place, path: LayerPath, layout: Layout, flow: Flow) -> Tensor:
    """Return one tensor of a path's model, the scales folded into it; worked out in float32.

    Args:
        tensor: As the layer's source has it.
        place: In the path's model.
        path: With scales or without.
        layout: Of the source of the ends.
        flow: Of its family.
    """
    name, factor = place.name, path.factors[-1 if place.layer is None else place.layer]
    if place.layer is not None:
        name = name.removeprefix(layout.layers.format(i=place.layer))
    module, _, kind = name.rpartition(".")
    multiplier, offset = flow.folded(module, kind, factor)
    if (multiplier, offset) == (1.0, 0.0):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * multiplier + offset
