"""Methods that work on each delta as a matrix: its singular values, its subspaces."""

from __future__ import annotations

from dataclasses import replace

from evomerge.catalogue.entry import MERGED_DELTA, Method, Parameter, weight

ENDS = Parameter(
    name="ends",
    scope="method",
    default=False,
    choices=(True, False),
    per_tensor=False,
    doc="also treat embedding and head as matrices, which is costly",
)
RANK = Parameter(
    name="rank",
    scope="method",
    default=1.0,
    low=0.3,
    high=1.0,
    valid_low=0.0,
    valid_high=1.0,
    doc="fraction kept of a source's share of singular directions (a matrix's smaller side divided by the "
    "number of sources), at least one direction",
)
STEPS = Parameter(
    name="steps",
    scope="method",
    default=300.0,
    low=50.0,
    high=5000.0,
    valid_low=0.0,
    valid_high=32768.0,
    doc="how long the loss is descended: number of steps, or time of the flow",
)
SHARE_OF_LOSS = replace(
    weight(1.0, 0.0, 2.0, "factor of the source's term of the loss, and of its delta in the start"),
    valid_low=0.0,
)

MATRICES = (
    "Matrices are 2-D tensors of attention, MLPs and other roles, and each expert of a 3-D tensor; embedding "
    "and head too if `ends`. "
)
OTHERS = "Other tensors get the mean of the weighted deltas. "
NULL_SPACE = (
    "Singular values below sqrt(max(rows, columns)) * 2**-23 of the largest count as zero, and their "
    "directions are left out, where reference code keeps directions that rounding decides. "
)

SPECTRAL = (
    Method(
        name="tsv_m",
        title="Leading singular vectors of each delta, decorrelated across sources",
        state_bytes=1.0,
        paper="Task Singular Vectors (TSV-Merge), CVPR 2025, arXiv 2412.00081",
        parameters=(
            weight(1.0, 0.0, 2.0, "factor of the source's singular values"),
            *MERGED_DELTA,
            RANK,
            ENDS,
        ),
        notes=MATRICES + OTHERS + "So do matrices with fewer rows or columns than there are sources, of "
        "which the reference keeps nothing. The reference decomposes embedding and head. "
        + NULL_SPACE
        + "Sources with the same delta share their directions evenly.",
    ),
    Method(
        name="iso_c",
        title="Sum of the deltas with all singular values set to their mean",
        paper="No Task Left Behind (Iso-C), ICML 2025, arXiv 2502.04959",
        parameters=(weight(1.0, 0.0, 2.0, "factor of the source's delta"), *MERGED_DELTA, ENDS),
        notes=MATRICES + OTHERS + NULL_SPACE + "The mean is over the non-zero singular values; the "
        "reference's is over all, and gives it to null directions as well: the same at full rank.",
    ),
    Method(
        name="iso_cts",
        title="Common directions of the sum and each source's own, with one singular value",
        paper="No Task Left Behind (Iso-CTS), ICML 2025, arXiv 2502.04959",
        parameters=(
            weight(1.0, 0.0, 2.0, "factor of the source's delta"),
            *MERGED_DELTA,
            Parameter(
                name="common",
                scope="method",
                default=0.8,
                low=0.3,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                doc="fraction of a matrix's directions taken from the sum of the deltas",
            ),
            ENDS,
        ),
        notes=MATRICES
        + OTHERS
        + NULL_SPACE
        + "One decomposition per source and matrix for every candidate. The "
        "common directions are removed on the left side only, as in the reference.",
    ),
    Method(
        name="wudi",
        title="Merged delta that interferes least with the subspace of every delta",
        state_bytes=5.0,
        paper="Whoever Started the Interference Should End It (WUDI-Merging), ICML 2025, arXiv 2503.08099",
        parameters=(
            SHARE_OF_LOSS,
            *MERGED_DELTA,
            STEPS,
            Parameter(
                name="solver",
                scope="method",
                default="flow",
                choices=("flow", "adam"),
                per_tensor=False,
                doc="exact gradient flow for the time `steps`, or the paper's Adam (rate 1e-5)",
            ),
            ENDS,
        ),
        notes=MATRICES + OTHERS + "The authors' code leaves them, and all but attention and MLP weights, "
        "as in the base; others average them. The flow covers (1 - exp(-c * steps)) of the way to the "
        "minimum along an eigenvector of eigenvalue c: one eigendecomposition per matrix and candidate, of "
        "the smaller of in_features and sources * out_features. Adam moves no entry by much more than "
        "1e-5 * steps, whatever the size of the deltas.",
    ),
    Method(
        name="optmerge",
        title="WUDI with deltas of low rank, descended from their mean",
        state_bytes=1.5,
        paper="OptMerge, ICLR 2026, arXiv 2505.19892",
        parameters=(
            SHARE_OF_LOSS,
            *MERGED_DELTA,
            RANK,
            STEPS,
            Parameter(
                name="learning_rate",
                scope="method",
                default=1e-4,
                low=1e-4,
                high=0.1,
                valid_low=0.0,
                valid_high=0.125,
                doc="learning rate of gradient descent with momentum 0.9",
            ),
            ENDS,
        ),
        notes=MATRICES + OTHERS + "Of two published variants the one of the language-model code: SGD with "
        "momentum from the mean, whose result is computed exactly by one eigendecomposition per matrix and "
        "candidate. At the published rate of 1e-4 it moves little from the mean. Ranks that would round "
        "down to none are one.",
    ),
    Method(
        name="opcm",
        title="Sources merged one after another, each by what is new in it",
        state_bytes=1.5,
        paper="Merging Models on the Fly Without Retraining (OPCM), NeurIPS 2025, arXiv 2501.09522",
        ordered=True,
        whole_model=True,
        parameters=(
            weight(1.0, 0.0, 2.0, "factor of the source's delta"),
            *MERGED_DELTA,
            Parameter(
                name="alpha",
                scope="method",
                default=0.5,
                low=0.0,
                high=0.95,
                valid_low=0.0,
                valid_high=1.0,
                doc="share of the singular values whose directions are closed to later sources",
            ),
            ENDS,
        ),
        notes=MATRICES
        + "Deltas of other tensors are added without projection. "
        + NULL_SPACE
        + "Sources come in the recipe's order; the paper shuffles them. Prepared state is one float32 delta "
        "of the model's matrices; where it does not fit in memory it is computed twice per candidate.",
    ),
    Method(
        name="doge",
        title="Deltas of one length, a shared correction by projected gradients, global masks",
        state_bytes=1.5,
        paper="Adaptive Projective Gradient Descent (DOGE), ICML 2025, arXiv 2501.01230",
        whole_model=True,
        parameters=(
            weight(1.0, 0.0, 2.0, "factor of the source's masked and corrected delta"),
            *MERGED_DELTA,
            Parameter(
                name="eta",
                scope="method",
                default=0.07,
                low=0.02,
                high=0.2,
                valid_low=0.0,
                valid_high=16.0,
                doc="norm that every delta matrix is scaled to",
            ),
            Parameter(
                name="keep",
                scope="method",
                default=0.3,
                low=0.05,
                high=1.0,
                valid_low=0.0,
                valid_high=1.0,
                per_tensor=False,
                doc="fraction of a source's delta entries that is kept, by magnitude over all matrices",
            ),
            Parameter(
                name="subspace",
                scope="method",
                default=6.0,
                low=2.0,
                high=16.0,
                valid_low=1.0,
                valid_high=1024.0,
                doc="the correction stays out of the leading 1 / subspace of the shared directions",
            ),
            replace(STEPS, default=400.0, low=100.0, high=600.0, doc="number of Adam steps (rate 1e-4)"),
            ENDS,
        ),
        notes=MATRICES + "Other tensors stay as in the base. " + NULL_SPACE + "Masks keep exact counts; the "
        "reference keeps one entry more. The correction depends on eta, subspace and steps alone: search "
        "keep, lambda and weights to find it once. A matrix that a source hardly changed is scaled up as "
        "much as any other, as published.",
        unverified="The authors' code could not be read; the port in FusionBench was, which works on the "
        "weights of CLIP's encoder.",
    ),
)
