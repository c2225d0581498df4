"""Averages whose weights follow from a rule: BAI, metrics, an EMA, the layer's place; and the lone source.

Nothing is prepared; a candidate is one weighted sum.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.loops import weighted_sum
from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.base import Kernel, Sources, Values, kernel


@kernel("bai")
class BalancedActor(Kernel):
    """`b (a theta_instruct + (1 - a) theta_reasoning) + (1 - b) theta_pretrained`."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        a, b = values.number("a"), values.number("b")
        weighted_sum((*sources.tensors, sources.given_base), (a * b, (1.0 - a) * b, 1.0 - b), out)


@kernel("mwa_power")
class MetricPower(Kernel):
    """`sum_i w_i theta_i` with `w_i` proportional to the source's metric to a power."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:
        """Write the average to `out`.

        Raises:
            CandidateError: A metric is not positive.
        """
        metrics, power = values.numbers("metric"), values.number("power")
        if min(metrics) <= 0.0:
            raise CandidateError(f"metric: expected numbers above 0, got {metrics}; use 1/loss, or the step")
        exponents = [power * math.log(metric) for metric in metrics]
        largest = max(exponents)  # taken off first, so that no power overflows
        weighted_sum(sources.tensors, shares([math.exp(e - largest) for e in exponents], True), out)


@kernel("ema")
class ExponentialMean(Kernel):
    """`e_0 = theta_0`, `e_k = beta e_(k-1) + (1 - beta) theta_k` over the sources in order, as one sum."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        beta, last = values.number("beta"), len(sources.tensors) - 1
        weights = [beta**last] + [(1.0 - beta) * beta ** (last - k) for k in range(1, last + 1)]
        weighted_sum(sources.tensors, weights, out)


@kernel("layer_swap")
class LayerSwap(Kernel):
    """Bottom and top layers from the language expert, those between from the task expert."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:
        """Write the layer's expert, or the average of both, to `out`.

        Raises:
            CandidateError: The model has fewer layers than the zones take.
        """
        task = _task_share(sources, values)
        weighted_sum(sources.tensors, (task, 1.0 - task), out)


def _task_share(sources: Sources, values: Values) -> float:
    """Return the share of the task expert at the tensor's place, the rest being the language expert's."""
    bottom, top, width = (int(values.number(name)) for name in ("bottom", "top", "transition"))
    below, above = (width if zone else 0 for zone in (bottom, top))
    if bottom + below + above + top > sources.layers:
        raise CandidateError(
            f"layer_swap: bottom {bottom}, top {top} and their transitions of {width} take "
            f"{bottom + below + above + top} layers, but the model has {sources.layers}; lower them"
        )
    layer = sources.place.layer
    if layer is None:
        return float(values.method["ends"] == "task")
    if layer < bottom or layer >= sources.layers - top:
        return 0.0
    if layer < bottom + below or layer >= sources.layers - top - above:
        return values.number("transition_weight")
    return 1.0


@kernel("passthrough")
class Passthrough(Kernel):
    """`scale theta` of the one source that the tensor has."""

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:  # noqa: D102
        weighted_sum(sources.tensors, values.numbers("scale"), out)
