"""The recipe of a run's candidate, with its sources where they lie now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.errors import ConflictError
from evomerge.recipe import Recipe, parse_recipe
from evomerge.report.summary import Summary
from evomerge.store import RunView


def best_number(run: RunView) -> int:
    """Return the number of the winner, or of the best so far.

    Raises:
        ConflictError: Nothing has been scored yet.
    """
    best = Summary(run).best
    if best is None:
        raise ConflictError(f'run "{run.name}": no candidate has been scored yet')
    return best


def recipe_of(run: RunView, number: int | None = None) -> Recipe:
    """Return the recipe of a candidate; None: of the winner.

    Raises:
        StoreError: There is no such candidate, or nothing has been scored yet.
    """
    if number is None:
        number = best_number(run)
    stored = parse_recipe(dict(run.candidate(number).recipe), f"candidate {number}")
    return stored.located(Path(run.facts["base_dir"]))


def as_mergekit(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as mergekit's config; reads the headers of its first source.

    Raises:
        UserError: mergekit cannot express it, or the source is gone.
    """
    from evomerge.checkpoints.layout import layout_of
    from evomerge.checkpoints.opening import open_checkpoint
    from evomerge.mergekit_writer import to_mergekit

    first = recipe.reference
    return to_mergekit(recipe, layout_of(open_checkpoint(first.path, first.revision)))
