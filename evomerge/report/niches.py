"""What the report shows of a run of the optimizer niches: its population over time, lineage, merge map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evomerge.errors import UserError
from evomerge.recipe import Recipe
from evomerge.report.depth import merge_map
from evomerge.report.figures import COLOURS, Drawing, Look, Panel, axes_at, both, coefficients, shortened
from evomerge.report.population import Population
from evomerge.store import RunView

CURVES = (
    Look("coverage: share of documents that somebody solves", "winner", "o"),
    Look("entropy: bits of a document, mean", "s0", "s"),
    Look("best score of those who live", "s1", "^"),
)


def population_section(run: RunView, best: int | None) -> dict[str, Any] | None:
    """Return the figures of a run's population, and what their captions say; None for other runs.

    Args:
        run: The run.
        best: The candidate whose lineage is drawn; None, or one that was not proposed: the fittest who lives.
    """
    try:
        found = Population(run)
    except UserError:
        return None
    if not found.curve:
        return None
    living = found.living
    child = best if best in found.parents else living[0].candidate.number
    tree = found.lineage(child)
    return {
        "curves": _curves(found.curve),
        "looks": CURVES,
        "lineage": _lineage(tree, found.depths),
        "child": child,
        "ancestors": len(tree) - 1,
        "living": len(living),
        "coverage": 100 * found.curve[-1][1],
    }


def _curves(curve: Sequence[tuple[int, float, float, float]]) -> Drawing:
    last = curve[-1]
    label = (
        f"After {last[0]} outcomes those who live solve {100 * last[1]:.0f} % of the documents together, the "
        f"entropy is {last[2]:.2f} bits, the best score {last[3]:.3f}."
    )

    def paint(width: int) -> Figure:
        figure = Figure(figsize=(width / 72, 280 / 72))
        axes = axes_at(figure, 46, 12, width - 62, 280 - 56)
        columns = list(zip(*curve, strict=True))
        for look, values in zip(CURVES, columns[1:], strict=True):
            marked = {"marker": look.marker, "ms": 4.5, "markevery": max(1, round(len(values) / 8))}
            axes.plot(columns[0], values, color=look.ink, lw=1.6, mec="none", **marked)
        axes.set(ylim=(-0.02, 1.02), xlabel="outcomes")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(visible=False, axis="x")
        return figure

    return both(paint, "curves", label)


def _lineage(tree: Mapping[int, Sequence[int]], depth: Mapping[int, int]) -> Drawing:
    child = max(tree)
    label = f"Candidate {child} and its {len(tree) - 1} ancestors over {depth[child]} generations."

    def paint(width: int) -> Figure:
        figure = Figure(figsize=(width / 72, 280 / 72))
        axes = axes_at(figure, 46, 16, width - 66, 280 - 60)
        for number, parents in tree.items():
            for parent in parents:
                line = {"color": COLOURS["soft"], "lw": 0.8, "alpha": 0.6, "zorder": 1}
                axes.plot([parent, number], [depth[parent], depth[number]], **line)
        founders = [number for number, parents in tree.items() if not parents]
        others = [number for number in tree if tree[number] and number != child]
        for numbers, colour, marker in ((others, "s0", "o"), (founders, "s1", "s"), ([child], "winner", "*")):
            size = {"ms": 13 if marker == "*" else 5, "mec": "none", "zorder": 3, "clip_on": False}
            axes.plot(numbers, [depth[n] for n in numbers], marker, color=COLOURS[colour], **size)
        axes.set(xlabel="candidate", ylabel="generation")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return figure

    return both(paint, "lineage", label)


def segment_coefficients(
    recipe: Recipe, facts: Mapping[str, Any], looks: Mapping[str, Look]
) -> dict[str, Any] | None:
    """Return the merge map as the page's section of coefficients; None if the run has no facts for it."""
    chromosomes, layers = facts.get("chromosomes"), int(facts.get("layers") or 0)
    if not chromosomes or len(chromosomes) != len(recipe.segments):
        return None
    names = [source.name for source in recipe.sources]
    panels, constants = [], []
    for table in merge_map(recipe, chromosomes, layers):
        lines = table["by_layer"]
        if layers > 1 and not np.isnan(lines).any():
            drawn = [(looks[name], lines[:, i].tolist()) for i, name in enumerate(names)]
            panels.append(Panel(table["title"], "coefficient", drawn))
        constants += [("mean coefficient", role, values) for role, values in table["outside"].items()]
    count = sum(len(table.starts) for table in recipe.segments)
    label = f"Mean coefficient of each source by layer; {count} segments. " + " ".join(
        shortened(panel.title, 60) for panel in panels
    )
    return {
        "drawing": coefficients(panels, label) if panels else None,
        "looks": list({look.name: look for panel in panels for look, _ in panel.lines}.values()),
        "names": names,
        "constants": constants,
        "whole": [("segments", "all tensors", float(count))],
    }
