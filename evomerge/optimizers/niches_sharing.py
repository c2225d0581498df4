"""Shared fitness: what every document is worth is divided among those who solve it (arXiv 2508.16204).

All functions take a matrix of scores, one row per individual and one column per document, with values in
[0, 1], 1 for a document that is solved. A document's capacity is the best score that any individual has on
it: 1 where one solves it, so that binary scores have the paper's capacity of 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def plain_fitness(scores: Array, weights: Array) -> Array:
    """Return each individual's weighted sum of scores, which nobody shares."""
    return _dots(scores, weights)


def shared_fitness(scores: Array, weights: Array, alpha: float) -> Array:
    """Return `f_i = sum_j weight_j s_ij c_j / z_j**alpha` for every individual.

    `z_j` is the sum of all scores on document j and `c_j` its capacity. A document that nobody solves at all
    gives nothing to anyone, where the formula says 0/0.

    Args:
        scores: (individuals, documents).
        weights: (documents,).
        alpha: How strongly rivals count: 0 not at all, 1 shares the document, above 1 they fight for it.
    """
    return _dots(scores, weights * _worth(scores, alpha))


def attraction(scores: Array, weights: Array, parent: int) -> Array:
    """Return `g_B = sum_j weight_j c_j / z_j max(s_Bj - s_Aj, 0)`: what each B could add to the parent A.

    Documents count for more where few solve them. It is 0 for the parent itself.
    """
    gain = np.maximum(scores - scores[parent], 0.0)
    return _dots(gain, weights * _worth(scores, 1.0))


def _dots(rows: Array, numbers: Array) -> Array:
    """Return the products of rows with numbers; equal rows give equal results, on any processor.

    A library's matrix product adds up some rows in another order than others, and so breaks ties at random.
    """
    return np.asarray((rows * numbers).sum(axis=1))


def _worth(scores: Array, alpha: float) -> Array:
    """Return every document's capacity over the sum of its scores to the power of alpha."""
    total, capacity = scores.sum(axis=0), scores.max(axis=0)
    rivals = np.where(total > 0.0, total, 1.0)  # where nobody solves anything, the capacity is 0
    return np.asarray(capacity / (rivals if alpha == 1.0 else rivals**alpha))


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
