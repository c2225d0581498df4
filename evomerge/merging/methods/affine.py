"""Methods whose result is a sum of the tensors with one factor each: linear, slerp, task arithmetic.

A candidate costs one read of every tensor with a factor other than zero, and one write.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.loops import gram
from evomerge.merging.methods.base import Kernel, Sources, Values, kernel, weighted_sum

PARALLEL = 0.9995
"""Above this |cosine| slerp is a straight line, where the two agree to rounding."""

SMALLEST_SUM = 1e-8


def shares(weights: list[float], normalize: bool) -> list[float]:
    """Return the weights, divided by their sum if `normalize`.

    Raises:
        CandidateError: The sum is too near to zero to divide by.
    """
    if not normalize:
        return weights
    whole = math.fsum(weights)
    if abs(whole) < SMALLEST_SUM:
        raise CandidateError(f"weights {weights} sum to {whole:.3g} and cannot be normalised")
    return [weight / whole for weight in weights]


@kernel("linear")
class Linear(Kernel):
    """`sum_i w_i theta_i`, the weights divided by their sum if `normalize`; or as segment tables say."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        if values.pieces:
            flat, target = [tensor.view(-1) for tensor in sources.tensors], out.view(-1)
            for piece in values.pieces:
                part = slice(piece.start, piece.stop)
                weighted_sum([tensor[part] for tensor in flat], piece.coefficients, target[part])
            return
        weights = shares(values.numbers("weight"), bool(values.method["normalize"]))
        weighted_sum(sources.tensors, weights, out)


@kernel("task_arithmetic")
class TaskArithmetic(Kernel):
    """`theta_0 + lambda sum_i w_i (theta_i - theta_0)`, as one sum over the checkpoints themselves."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        weights = shares(values.numbers("weight"), bool(values.method["normalize"]))
        scale = values.number("lambda")
        factors = [scale * weight for weight in weights]
        weighted_sum((sources.given_base, *sources.tensors), (1.0 - math.fsum(factors), *factors), out)


@kernel("slerp")
class Slerp(Kernel):
    """Great-circle interpolation of two flattened tensors; prepared: the sine and angle between them."""

    def prepare(self, sources: Sources, values: Values) -> float | None:
        """Return the angle in radians between the two tensors; None where a straight line is exact."""
        products = gram(sources.tensors)
        norms = math.sqrt(products[0][0]) * math.sqrt(products[1][1])
        if norms == 0.0:
            return None
        cosine = products[0][1] / norms
        return None if abs(cosine) > PARALLEL else math.acos(cosine)

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        t = values.number("t")
        if prepared is None:
            factors = (1.0 - t, t)
        else:
            factors = (
                math.sin((1.0 - t) * prepared) / math.sin(prepared),
                math.sin(t * prepared) / math.sin(prepared),
            )
        weighted_sum(sources.tensors, factors, out)
