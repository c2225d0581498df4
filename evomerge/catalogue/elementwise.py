"""Methods that decide entry by entry, or column by column, from all sources at once."""

from __future__ import annotations

from evomerge.catalogue.entry import MERGED_DELTA, Method, Parameter, weight

FUSECHAT = "FuseChat, arXiv 2408.07990"

ELEMENTWISE: tuple[Method, ...] = (
    Method(
        name="consensus",
        title="Sum of the deltas, only where several sources count on the entry (Consensus TA)",
        paper="Localizing Task Information (TALL-masks), arXiv 2405.07813",
        parameters=(
            Parameter(
                name="tall_lambda",
                scope="source",
                default=0.4,
                low=0.2,
                high=0.6,
                valid_low=0.0,
                doc="a source counts where its delta exceeds this times the sum of the others",
            ),
            Parameter(
                name="agreement",
                scope="method",
                default=2.0,
                low=0.0,
                high=4.0,
                valid_low=0.0,
                doc="fewest sources that count on an entry that is kept; 0 keeps all (task arithmetic)",
            ),
            *MERGED_DELTA,
        ),
        notes="The paper's alpha is lambda, from 0 to 1. It picks tall_lambda for each task on validation "
        "data, from 0.2 to 0.6. Entries at which a source equals the base are never its own.",
    ),
    Method(
        name="sce",
        title="Select entries by variance, weight sources by energy, erase minority signs",
        state_bytes=1.5,
        paper=FUSECHAT,
        parameters=(
            Parameter(
                name="select_topk",
                scope="method",
                default=1.0,
                low=0.05,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                doc="fraction of the entries with a variance among the sources that is selected",
            ),
            Parameter(
                name="variant",
                scope="method",
                default="mergekit",
                choices=("mergekit", "fusechat"),
                per_tensor=False,
                doc="mergekit: entries not selected stay the base's; fusechat: selection only makes weights",
            ),
            *MERGED_DELTA,
        ),
        mergekit=True,
        notes="Counts are exact, of equal variances the earlier entry is selected first; select_topk 1 "
        "selects also entries without variance. mergekit gives equal weights to sources whose mean squares "
        "sum to less than 1e-6, which is common for real deltas; the variant fusechat only where all are 0.",
        unverified="The variant fusechat follows a description of its code, not the code.",
    ),
    Method(
        name="varm",
        title="Average of the sources, weighted by how far each has moved from the base (VaRM)",
        paper=f"{FUSECHAT} (first version, arXiv 2402.16107)",
        whole_model=True,
        parameters=(
            Parameter(
                name="granularity",
                scope="method",
                default="tensor",
                choices=("tensor", "layer", "role", "model"),
                per_tensor=False,
                doc="what shares weights: a tensor, a layer, a layer's tensors of one role, the model",
            ),
            Parameter(
                name="statistic",
                scope="method",
                default="square",
                choices=("square", "abs", "mean"),
                per_tensor=False,
                doc="mean over the entries of the delta's square, its magnitude, or itself",
            ),
            Parameter(
                name="temperature",
                scope="method",
                default=0.0,
                low=0.0,
                high=10.0,
                valid_low=0.0,
                per_tensor=False,
                doc="weights are the softmax of statistic / temperature; 0: the statistic over its sum",
            ),
        ),
        notes="What lies outside the layers is one layer of its own. A statistic is the mean over all "
        "entries of a group. Sources that have not moved at all share the weight equally.",
        unverified="Which statistic made the published model, and whether FuseChat's means over a group "
        "weigh tensors by their size.",
    ),
    Method(
        name="pcb",
        title="Let entries compete within and between sources, average the winners by score",
        paper="Parameter Competition Balancing (PCB-Merging), arXiv 2410.02396",
        whole_model=True,
        parameters=(
            weight(1.0, 0.8, 1.3, "factor of the source's entries, not of their share in the average"),
            Parameter(
                name="ratio",
                scope="method",
                default=0.1,
                low=0.02,
                high=0.5,
                valid_low=0.0,
                valid_high=1.0,
                per_tensor=False,
                doc="fraction of each source's entries that scores above zero",
            ),
            Parameter(
                name="scope",
                scope="method",
                default="model",
                choices=("model", "tensor"),
                per_tensor=False,
                doc="whether entries compete within the whole model (the paper) or within their tensor",
            ),
            *MERGED_DELTA,
        ),
        notes="The published code, with its order statistics exact in both scopes; model reads every tensor "
        "four times per candidate. Where it divides 0 by 0 (all scores equal), the largest score has "
        "share 1 if it is above zero, and share 0 otherwise.",
        unverified="The paper's text describes a softmax where its code squares; the code counts here.",
    ),
    Method(
        name="widen",
        title="Weigh each column of each delta by how much its length and direction changed (WIDEN)",
        paper="Extend Model Merging to Pre-Trained LLMs (WIDEN), arXiv 2408.03092",
        parameters=(
            Parameter(
                name="above_average_value_ratio",
                scope="method",
                default=1.0,
                low=0.5,
                high=2.0,
                valid_low=0.0,
                doc="a column is important where its rank exceeds this times the mean rank",
            ),
            Parameter(
                name="score_calibration_value",
                scope="method",
                default=1.0,
                low=0.2,
                high=1.5,
                doc="score of important columns; the others have a softmax over the sources",
            ),
            *MERGED_DELTA,
        ),
        notes="Embeddings are judged token by token, tensors of three axes matrix by matrix, vectors entry "
        "by entry. Columns of length 0 have no direction: it has changed fully where only one is 0. "
        "Scores do not sum to one.",
    ),
    Method(
        name="nearswap",
        title="Move each entry of the first source towards the second, by t at most",
        paper="alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        base="none",
        min_sources=2,
        max_sources=2,
        ordered=True,
        parameters=(
            Parameter(
                name="t",
                scope="method",
                default=0.0001,
                low=0.0,
                high=0.01,
                valid_low=0.0,
                doc="largest change of an entry, in units of the weights; 0 is the first source",
            ),
        ),
        mergekit=True,
        notes="The first source is mergekit's base_model. For t below 1e-6 mergekit moves entries that are "
        "nearer than that less.",
    ),
    Method(
        name="arcee_fusion",
        title="Take over the entries of one source that changed most, by importance",
        state_bytes=1.0,
        paper="Arcee Fusion, mergekit documentation (no paper)",
        max_sources=1,
        parameters=MERGED_DELTA,
        mergekit=True,
        notes="Importance is |delta| times the divergence of the softmax of its row, in float64; kept is "
        "what reaches median + 1.5 interquartile ranges. The result is that of mergekit in float64. In "
        "float32, rounding dominates mergekit's divergence of deltas around 1e-3: it keeps other entries. "
        "Quartiles are exact here; mergekit samples those of tensors above a million entries.",
    ),
)
