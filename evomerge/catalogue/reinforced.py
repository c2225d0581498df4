"""Methods that tell entries that one source changed from those that several changed."""

from __future__ import annotations

from evomerge.catalogue.entry import MERGED_DELTA, Method, Parameter

_PAPER = "Reinforced Agent Merging, arXiv 2601.13572"
_EPSILON = Parameter(
    name="epsilon",
    scope="method",
    default=1e-5,
    low=1e-6,
    high=1e-3,
    valid_low=0.0,
    doc="an entry counts as changed by a source where its delta exceeds this in magnitude",
)
_NOTES = "Shared entries get the mean of the deltas of the sources that changed them. As in mergekit."
_UNVERIFIED = "Formulas are those of mergekit, not checked against the paper."

REINFORCED = (
    Method(
        name="ram",
        title="Add entries that one source changed, average those that several changed",
        paper=_PAPER,
        parameters=(_EPSILON, *MERGED_DELTA),
        mergekit=True,
        notes=_NOTES,
        unverified=_UNVERIFIED,
    ),
    Method(
        name="ramplus_tl",
        title="As ram, with the entries of a source's own scaled up by how much of its change is shared",
        paper=_PAPER,
        parameters=(
            Parameter(
                name="r",
                scope="method",
                default=0.1,
                low=0.0,
                high=0.5,
                valid_low=0.0,
                doc="what the factor of a source's own entries grows by per ratio of shared to own entries",
            ),
            Parameter(
                name="alpha",
                scope="method",
                default=0.2,
                low=0.0,
                high=1.0,
                valid_low=0.0,
                doc="the largest ratio of shared to own entries that counts",
            ),
            _EPSILON,
            *MERGED_DELTA,
        ),
        mergekit=True,
        notes=f"{_NOTES} The ratio is that of the tensor (tensor-local), as the name says in mergekit.",
        unverified=_UNVERIFIED,
    ),
)
