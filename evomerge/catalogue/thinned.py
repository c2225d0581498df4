"""Methods that keep some entries of each delta and drop the others, or let entries vote."""

from __future__ import annotations

from dataclasses import replace

from evomerge.catalogue.entry import DENSITY, MERGED_DELTA, RESCALE, Method, Parameter, normalize, weight

_EPSILON = Parameter(
    name="epsilon",
    scope="source",
    default=0.15,
    low=0.01,
    high=0.15,
    valid_low=0.0,
    valid_high=0.5,
    doc="half the span of the probabilities over a row; below min(density, 1 - density)",
)
_GRADED_DENSITY = replace(
    DENSITY, low=0.2, high=0.8, doc="mean probability of an entry to be kept; 1 keeps all, whatever epsilon"
)
_GAMMA = Parameter(
    name="gamma",
    scope="source",
    default=0.01,
    low=0.0,
    high=0.05,
    valid_low=0.0,
    valid_high=1.0,
    doc="fraction of the largest entries that is dropped, as far as the density leaves room for it",
)
_VOTED = "factor of the source's thinned delta, and of its vote"
_ADDED = "factor of the source's thinned delta"
_BREADCRUMBS_NOTES = (
    "Cuts are tensor by tensor, as in mergekit; the paper's code cuts row by row. Density 1 keeps all."
)
_DELLA_NOTES = (
    "Ranks are by row (the last dimension), a vector is one row. The paper divides each survivor by its own "
    "probability (rescale: expectation), mergekit rescales to the L1 norm. Masks as for DARE."
)
_DELLA = "DELLA-Merging, arXiv 2406.11617"
_BREADCRUMBS = "Model Breadcrumbs, arXiv 2312.06795"

THINNED = (
    Method(
        name="ties",
        title="Trim deltas by magnitude, elect a sign, average those that agree",
        state_bytes=0.2,
        paper="TIES-Merging, arXiv 2306.01708",
        parameters=(
            weight(1.0, 0.0, 1.5, "factor of the source's trimmed delta, and of its vote"),
            DENSITY,
            *MERGED_DELTA,
            normalize(True, "divide by the weights of the sources that agree"),
            Parameter(
                name="variant",
                scope="method",
                default="mergekit",
                choices=("mergekit", "paper"),
                per_tensor=False,
                doc="mergekit: trim tensor by tensor, a sum of zero elects plus; paper: trim over the whole "
                "model, a sum of zero elects the more frequent sign",
            ),
        ),
        mergekit=True,
        whole_model=True,
        notes="The paper has no weights: leave them at 1. Of equal magnitudes at the cut an even sample is "
        "kept, so that the density is met; the paper's code keeps all of them.",
    ),
    Method(
        name="dare_linear",
        title="Drop delta entries at random and rescale, then task arithmetic",
        paper="Language Models are Super Mario (DARE), arXiv 2311.03099",
        random=True,
        parameters=(
            weight(1.0, 0.0, 1.5, "factor of the source's delta"),
            DENSITY,
            *MERGED_DELTA,
            normalize(False, "divide by the sum of the weights"),
            RESCALE,
        ),
        mergekit=True,
        notes="Masks come from a counter-based generator keyed by seed, source and tensor, and are "
        "nested in density; mergekit's masks depend on the order of its work.",
    ),
    Method(
        name="dare_ties",
        title="Drop delta entries at random and rescale, then elect a sign and sum those that agree",
        paper="Language Models are Super Mario (DARE), arXiv 2311.03099",
        random=True,
        parameters=(
            weight(1.0, 0.0, 1.5, "factor of the source's delta, and of its vote"),
            DENSITY,
            *MERGED_DELTA,
            normalize(False, "divide by the weights of the sources that agree"),
            RESCALE,
        ),
        mergekit=True,
        notes="The random drop replaces the magnitude trim, as in mergekit.",
    ),
    Method(
        name="della",
        title="Drop delta entries at random, small ones sooner, and rescale, then elect a sign",
        state_bytes=2.0,
        paper=_DELLA,
        random=True,
        parameters=(
            weight(1.0, 0.0, 1.5, _VOTED),
            _GRADED_DENSITY,
            _EPSILON,
            *MERGED_DELTA,
            normalize(True, "divide by the weights of the sources that agree"),
            RESCALE,
        ),
        mergekit=True,
        notes=_DELLA_NOTES,
    ),
    Method(
        name="della_linear",
        title="Drop delta entries at random, small ones sooner, and rescale, then task arithmetic",
        state_bytes=2.0,
        paper=_DELLA,
        random=True,
        parameters=(
            weight(1.0, 0.0, 1.5, _ADDED),
            _GRADED_DENSITY,
            _EPSILON,
            *MERGED_DELTA,
            normalize(False, "divide by the sum of the weights"),
            RESCALE,
        ),
        mergekit=True,
        notes=_DELLA_NOTES,
    ),
    Method(
        name="breadcrumbs",
        title="Drop the largest and the smallest delta entries, then task arithmetic",
        state_bytes=0.2,
        paper=_BREADCRUMBS,
        parameters=(
            weight(1.0, 0.0, 1.5, _ADDED),
            DENSITY,
            _GAMMA,
            *MERGED_DELTA,
            normalize(False, "divide by the sum of the weights"),
        ),
        mergekit=True,
        notes=_BREADCRUMBS_NOTES,
    ),
    Method(
        name="breadcrumbs_ties",
        title="Drop the largest and the smallest delta entries, then elect a sign and sum those that agree",
        state_bytes=0.2,
        paper=_BREADCRUMBS,
        parameters=(
            weight(1.0, 0.0, 1.5, _VOTED),
            DENSITY,
            _GAMMA,
            *MERGED_DELTA,
            normalize(False, "divide by the weights of the sources that agree"),
        ),
        mergekit=True,
        notes=_BREADCRUMBS_NOTES,
    ),
)
