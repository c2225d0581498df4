"""The report's figure of a layer path: which layer of which source, in order, and the scales between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evomerge.recipe import LayerPath, Recipe
from evomerge.report.figures import COLOURS, Drawing, Look, axes_at, both

MOST_DOTS = 60
"""Steps up to which each has a marker."""


def path_context(
    recipe: Recipe | None, looks: Mapping[int, Look], new: Callable[[str, int], Look]
) -> dict[str, Any] | None:
    """Return what the page shows of a layer path; None for recipes without one.

    Args:
        recipe: The winner's.
        looks: How models are drawn, by candidate.
        new: Gives a source that is none of them a look, from its name and place.
    """
    if recipe is None or recipe.path is None:
        return None
    known = {look.name: look for look in looks.values()}
    names = [source.name for source in recipe.sources]
    drawn = {name: known.get(name) or new(name, place) for place, name in enumerate(names)}
    return {
        "drawing": path_drawing(recipe.path, drawn),
        "looks": list(drawn.values()),
        "words": path_in_words(recipe.path),
        "scaled": recipe.path.scaled,
        "steps": [
            (number, step.source, step.layer, step.scale) for number, step in enumerate(recipe.path.layers)
        ],
    }


def path_drawing(path: LayerPath, looks: Mapping[str, Look]) -> Drawing:
    """Draw a path from left to right, the layer's number in its source upwards, and its scales below.

    Args:
        path: The path.
        looks: Source name to how it is drawn.
    """

    def paint(width: int) -> Figure:
        rows = 2 if path.scaled else 1
        heights = (190, 120)[:rows]
        figure = Figure(figsize=(width / 72, (sum(heights) + 34 * rows + 14) / 72))
        upper = axes_at(figure, 42, 12, width - 60, heights[0])
        steps = range(len(path.layers))
        upper.plot(steps, [step.layer for step in path.layers], color=COLOURS["line"], lw=1.4, zorder=2)
        dots = 5.5 if len(path.layers) <= MOST_DOTS else 3.0
        for name, look in looks.items():
            own = [(i, step.layer) for i, step in enumerate(path.layers) if step.source == name]
            places = {"ls": "none", "marker": look.marker, "ms": dots, "mec": "none", "zorder": 3}
            upper.plot([i for i, _ in own], [layer for _, layer in own], color=look.ink, **places)
        _label(upper, "layer of the source", "" if rows == 2 else "place in the path")
        upper.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if rows == 2:
            lower = axes_at(figure, 42, 12 + heights[0] + 30, width - 60, heights[1])
            lower.axhline(1.0, color=COLOURS["line"], lw=1.0)
            lower.vlines(steps, 1.0, [step.scale for step in path.layers], color=COLOURS["soft"], lw=1.2)
            for i, step in enumerate(path.layers):
                look = looks[step.source]
                lower.plot([i], [step.scale], look.marker, color=look.ink, ms=dots, mec="none", zorder=3)
            _label(lower, "scale before it", "place in the path")
            lower.set_xlim(upper.get_xlim())
        return figure

    return both(paint, "path", path_in_words(path))


def path_in_words(path: LayerPath) -> str:
    """Return the path as stretches of layers."""
    parts = []
    for source, first, end in path.runs:
        parts.append(f"{source} {first}" if end == first + 1 else f"{source} {first} to {end - 1}")
    scales = " Scales lie before some of them." if path.scaled else ""
    return f"The winner runs through {len(path.layers)} layers: {', '.join(parts)}.{scales}"


def _label(axes: Any, vertical: str, horizontal: str) -> None:
    axes.set_ylabel(vertical)
    axes.xaxis.set(label_text=horizontal, major_locator=MaxNLocator(10, integer=True, min_n_ticks=1))
