"""Methods whose result is a sum of the sources with one factor each for a tensor, a row or a column."""

from __future__ import annotations

from evomerge.catalogue.entry import MERGED_DELTA, Method, Parameter, normalize, weight

MAX_ITER = Parameter(
    name="max_iter",
    scope="method",
    default=10.0,
    low=1.0,
    high=50.0,
    valid_low=0.0,
    valid_high=1000.0,
    per_tensor=False,
    doc="most steps of the iteration, rounded down",
)
TOL = Parameter(
    name="tol",
    scope="method",
    default=1e-5,
    low=1e-8,
    high=1e-3,
    valid_low=0.0,
    valid_high=1.0,
    per_tensor=False,
    doc="step in radians that ends the iteration; shorter tensors and nearer directions do not count",
)
EPS = Parameter(
    name="eps",
    scope="method",
    default=1e-8,
    low=1e-10,
    high=1e-4,
    valid_low=0.0,
    valid_high=1.0,
    per_tensor=False,
    doc="added to lengths that are divided by; a shorter mean direction is none",
)
LAYERS = "rounded down to a whole number of layers"

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
    Method(
        name="nuslerp",
        title="Spherical interpolation of two sources, or of their deltas from a base",
        paper="mergekit, github.com/arcee-ai/mergekit",
        base="optional",
        min_sources=2,
        max_sources=2,
        parameters=(
            weight(1.0, 0.0, 1.0, "the way to the second source is its weight / the sum of both"),
            Parameter(
                name="nuslerp_flatten",
                scope="method",
                default=True,
                choices=(True, False),
                doc="one angle for the tensor; off: one for each of its slices along the last dimension",
            ),
            Parameter(
                name="nuslerp_row_wise",
                scope="method",
                default=False,
                choices=(True, False),
                doc="where not flat: slices along the first dimension (a matrix's columns), not the last",
            ),
        ),
        mergekit=True,
        notes="mergekit's names: row-wise interpolates columns. Weights that cancel out meet half way. A "
        "tensor of zeros counts as at a right angle. Directions that agree or oppose each other within a "
        "sine of 1e-6 are interpolated linearly; mergekit does so within 1e-8, which its float32 angles "
        "cannot resolve.",
    ),
    Method(
        name="multislerp",
        title="Mean direction of the sources, or of their deltas from a base, at their mean length",
        paper="Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit",
        base="optional",
        parameters=(
            weight(1.0, 0.0, 1.0, "share of the source's direction and length"),
            Parameter(
                name="normalize_weights",
                scope="method",
                default=True,
                choices=(True, False),
                doc="divide by the sum of the weights",
            ),
            EPS,
        ),
        mergekit=True,
        notes="mergekit's step in the tangent space at the weighted mean direction is zero by construction, "
        "so what it computes is that direction times the weighted sum of lengths; so does this. A single "
        "source is copied. Directions that cancel out: two sources are averaged linearly, more are refused; "
        "tensors whose deltas are all zero keep the base, where mergekit refuses three or more.",
    ),
    Method(
        name="karcher",
        title="Karcher mean of the sources' directions, at their mean length",
        paper="Functionality-Oriented LLM Merging on the Fisher-Rao Manifold, arXiv 2603.04972; mergekit",
        base="none",
        parameters=(
            Parameter(
                name="weight",
                scope="source",
                default=1.0,
                low=0.0,
                high=1.0,
                valid_low=0.0,
                doc="share of the source, divided by the sum of all",
            ),
            MAX_ITER,
            TOL,
        ),
        mergekit=True,
        notes="The iteration of mergekit, whose weights are all equal; other weights are ours. A source "
        "opposite to the mean pulls to no side. Directions that cancel out start at the first.",
        unverified="The paper was read in abstract only; the iteration is mergekit's.",
    ),
    Method(
        name="model_stock",
        title="Base and mean of the sources, at a ratio that follows from the angle between the deltas",
        paper="Model Stock, arXiv 2403.19522",
        min_sources=2,
        parameters=(
            *MERGED_DELTA,
            Parameter(
                name="filter_wise",
                scope="method",
                default=False,
                choices=(True, False),
                doc="an angle for each slice along the last dimension (a matrix's rows), not one per tensor",
            ),
            Parameter(
                name="clamp",
                scope="method",
                default=True,
                choices=(True, False),
                doc="keep the ratio of mean to base within 0 to 1; off: as mergekit",
            ),
        ),
        mergekit=True,
        notes="Without clamp, deltas at a mean cosine below 0 extrapolate away from the sources, without "
        "bound where 1 + (N - 1) cos goes to 0; within 1e-6 of 0 the base is kept, as in mergekit.",
        unverified="For more than two sources the cosine is the mean over pairs, which is mergekit's rule; "
        "no code of the authors was published.",
    ),
    Method(
        name="bai",
        title="Instruct and reasoning model averaged, then averaged with the pretrained one",
        paper="Balanced Actor Initialization, arXiv 2509.00309",
        min_sources=2,
        max_sources=2,
        ordered=True,
        parameters=(
            Parameter(
                name="a",
                scope="method",
                default=0.5,
                low=0.2,
                high=0.8,
                valid_low=0.0,
                valid_high=1.0,
                doc="share of the instruct model, the first source, in the average of the two",
            ),
            Parameter(
                name="b",
                scope="method",
                default=0.8,
                low=0.5,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                doc="share of that average in its average with the pretrained model, the base",
            ),
        ),
        notes="b scales the merged delta, in place of lambda.",
        unverified="The published ratios could not be checked: names, defaults and ranges of a and b are "
        "ours.",
    ),
    Method(
        name="mwa_power",
        title="Average of a run's checkpoints, weighted by a power of a metric",
        paper="Metrics-Weighted Averaging, arXiv 2504.18580",
        base="none",
        parameters=(
            Parameter(
                name="metric",
                scope="source",
                default=1.0,
                low=0.1,
                high=10.0,
                valid_low=0.0,
                per_tensor=False,
                doc="a number above 0, measured, larger is better: 1 / training loss, or the training step",
            ),
            Parameter(
                name="power",
                scope="method",
                default=1.0,
                low=0.0,
                high=10.0,
                doc="a source's weight is its metric to this power / the sum of all; 0: equal weights",
            ),
        ),
        unverified="That weights follow from a metric and one penalty factor is the paper's; that the factor "
        "is a power is ours.",
    ),
    Method(
        name="ema",
        title="Exponential moving average of a run's checkpoints",
        paper="Polyak and Juditsky 1992, doi 10.1137/0330046 (averaging); as an offline average: ours",
        base="none",
        ordered=True,
        parameters=(
            Parameter(
                name="beta",
                scope="method",
                default=0.9,
                low=0.5,
                high=0.999,
                valid_low=0.0,
                valid_high=1.0,
                doc="what the average keeps of itself from one checkpoint to the next",
            ),
        ),
        notes="Sources are the checkpoints from first to last; the average starts as the first, which keeps "
        "beta^(N-1).",
    ),
    Method(
        name="layer_swap",
        title="Bottom and top layers of a language expert around the middle of a task expert",
        paper="Layer Swapping for Zero-Shot Cross-Lingual Transfer, arXiv 2410.01335",
        base="none",
        min_sources=2,
        max_sources=2,
        ordered=True,
        parameters=(
            Parameter(
                name="bottom",
                scope="method",
                default=1.0,
                low=0.0,
                high=8.0,
                valid_low=0.0,
                per_tensor=False,
                doc=f"first layers that are the language expert's, the second source's, {LAYERS}",
            ),
            Parameter(
                name="top",
                scope="method",
                default=1.0,
                low=0.0,
                high=8.0,
                valid_low=0.0,
                per_tensor=False,
                doc=f"last layers that are the language expert's, {LAYERS}",
            ),
            Parameter(
                name="transition",
                scope="method",
                default=0.0,
                low=0.0,
                high=3.0,
                valid_low=0.0,
                per_tensor=False,
                doc=f"layers next to either that average both experts, {LAYERS}",
            ),
            Parameter(
                name="transition_weight",
                scope="method",
                default=0.5,
                low=0.0,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                doc="share of the task expert, the first source, in that average",
            ),
            Parameter(
                name="ends",
                scope="method",
                default="language",
                choices=("language", "task"),
                doc="expert that gives embedding, head and final norm",
            ),
        ),
        notes="Where a model keeps no layers of the language expert below (or above), nothing is averaged "
        "there either.",
        unverified="The published numbers of layers and what gives embedding, head and final norm could not "
        "be checked: these defaults are ours.",
    ),
    Method(
        name="passthrough",
        title="One source as it is, or scaled; with slices, a model of stacked layers",
        paper="mergekit, github.com/arcee-ai/mergekit",
        base="none",
        max_sources=1,
        parameters=(
            Parameter(
                name="scale",
                scope="source",
                default=1.0,
                low=0.3,
                high=1.2,
                doc="factor of the source's tensor",
            ),
        ),
        mergekit=True,
    ),
)
