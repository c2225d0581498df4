"""Methods whose result is a sum of the sources with one factor each for a tensor, a row or a column."""

from __future__ import annotations

from evomerge.catalogue.entry import MERGED_DELTA, Method, Parameter, normalize, weight

AVERAGES = (
    Method(
        name="linear",
        title="Weighted average of the sources",
        paper="Model soups, arXiv 2203.05482",
        base="none",
        parameters=(
            weight(1.0, 0.0, 1.0, "share of the source"),
            normalize(True, "divide by the sum of the weights"),
        ),
        mergekit=True,
    ),
    Method(
        name="slerp",
        title="Spherical interpolation of two sources, tensor by tensor",
        paper="Shoemake 1985, doi 10.1145/325165.325242",
        base="none",
        min_sources=2,
        max_sources=2,
        parameters=(
            Parameter(
                name="t",
                scope="method",
                low=0.0,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                doc="0 is the first source, 1 the second",
            ),
        ),
        mergekit=True,
        notes="Tensors whose directions agree within |cos| > 0.9995 are interpolated linearly, "
        "as in mergekit.",
    ),
    Method(
        name="task_arithmetic",
        title="Base plus weighted sum of deltas",
        paper="Editing models with task arithmetic, arXiv 2212.04089",
        parameters=(
            weight(1.0, 0.0, 1.5, "factor of the source's delta"),
            *MERGED_DELTA,
            normalize(False, "divide by the sum of the weights"),
        ),
        mergekit=True,
    ),
)
