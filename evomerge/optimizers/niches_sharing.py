"""Shared fitness: what every document is worth is divided among those who solve it (arXiv 2508.16204).

All functions take a matrix of scores, one row per individual and one column per document, with values in
[0, 1], 1 for a document that is solved. A document's capacity is the best score that any individual has on
it: 1 where one solves it, so that binary scores have the paper's capacity of 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def binary_only(scores: Array) -> bool:
    """Return whether all scores are 0 or 1."""
    return bool(((scores == 0.0) | (scores == 1.0)).all())


def plain_fitness(scores: Array, weights: Array) -> Array:
    """Return each individual's weighted sum of scores; equal rows give equal sums, on any processor.

    A library's matrix product adds up some rows in another order than others, and so breaks ties at random;
    `einsum` by itself goes through every row alike.
    """
    return np.asarray(np.einsum("ij,j->i", scores, weights))


def worth(scores: Array, weights: Array, alpha: float, *, binary: bool = False) -> Array:
    """Return `weight_j c_j / z_j**alpha`: what a document gives to each who solves it, (documents,).

    `z_j` is the sum of all scores on document j and `c_j` its capacity. A document that nobody solves at all
    gives nothing to anyone, where the formula says 0/0.

    Args:
        scores: (individuals, documents).
        weights: (documents,).
        alpha: How strongly rivals count: 0 not at all, 1 shares the document, above 1 they fight for it.
        binary: All scores are 0 or 1; only saves time.
    """
    total = scores.sum(axis=0)
    capacity = np.minimum(total, 1.0) if binary else scores.max(axis=0)
    rivals = np.where(total > 0.0, total, 1.0)  # where nobody solves anything, the capacity is 0
    return np.asarray(weights * (capacity / (rivals if alpha == 1.0 else rivals**alpha)))


def shared_fitness(scores: Array, weights: Array, alpha: float) -> Array:
    """Return `f_i = sum_j weight_j s_ij c_j / z_j**alpha` for every individual; see `worth`."""
    return plain_fitness(scores, worth(scores, weights, alpha))


def attraction(scores: Array, shared: Array, parent: int, *, binary: bool = False) -> Array:
    """Return `g_B = sum_j weight_j c_j / z_j max(s_Bj - s_Aj, 0)`: what each B could add to the parent A.

    Documents count for more where few solve them. It is 0 for the parent itself.

    Args:
        scores: (individuals, documents).
        shared: The documents' `worth` at alpha 1.
        parent: The row of A.
        binary: All scores are 0 or 1: what A lacks is then the same for all; only saves time.
    """
    if binary:
        return plain_fitness(scores, shared * (1.0 - scores[parent]))
    gain = scores - scores[parent]
    np.maximum(gain, 0.0, out=gain)
    return plain_fitness(gain, shared)


def coverage(scores: Array) -> float:
    """Return the share of documents that at least one individual solves: the mean of the capacities."""
    return float(scores.max(axis=0).mean()) if scores.size else 0.0


def entropy(scores: Array) -> float:
    """Return the mean over documents of the binary entropy, in bits, of the share that solves them."""
    if not scores.size:
        return 0.0
    share = scores.mean(axis=0)
    inside = (share > 0.0) & (share < 1.0)
    p = np.where(inside, share, 0.5)
    bits = -(p * np.log2(p) + (1.0 - p) * np.log2(1.0 - p))
    return float(np.where(inside, bits, 0.0).mean())
