"""Methods that keep some entries of each delta and drop the others, or let entries vote."""

from __future__ import annotations

from evomerge.catalogue.entry import DENSITY, MERGED_DELTA, RESCALE, Method, normalize, weight

THINNED = (
    Method(
        name="ties",
        title="Trim deltas by magnitude, elect a sign, average those that agree",
        paper="TIES-Merging, arXiv 2306.01708",
        parameters=(
            weight(1.0, 0.0, 1.5, "factor of the source's trimmed delta, and of its vote"),
            DENSITY,
            *MERGED_DELTA,
            normalize(True, "divide by the weights of the sources that agree"),
        ),
        mergekit=True,
        notes="Trimmed tensor by tensor with exact counts, vote by weighted sum, a tie elects plus "
        "(mergekit's rules); the paper trims over the whole model vector and has no weights.",
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
)
