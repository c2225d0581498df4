"""Means by angle: NuSLERP, multi-SLERP, Karcher mean, and Model Stock, whose share of the base is an angle's.

All that these need to know of a tensor are the lengths of its sources, or of their deltas, and the cosines
between them. `prepare` finds these, so a candidate costs one weighted sum; where angles are taken slice by
slice, every slice has factors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.blocks import ROW_ELEMENTS
from evomerge.merging.loops import weighted_sum
from evomerge.merging.methods.affine import shares
from evomerge.merging.methods.angles import Rays, Slices, rays
from evomerge.merging.methods.base import Kernel, Sources, Values, kernel

SMALLEST_SINE = 1e-6
"""Below this sine NuSLERP takes a straight line: where directions agree the two are equal to float32's
rounding, where they oppose each other no great circle is the shortest."""

SMALLEST_LENGTH = 1e-7
"""NuSLERP divides by no length smaller than this, so a tensor of zeros is at a right angle to any other."""

SMALLEST_PRODUCT = 1e-6
"""Model Stock divides by no product of two lengths smaller than this."""

SMALLEST_DIVISOR = 1e-6
"""Below this `1 + (N - 1) cos` Model Stock has no estimate and keeps the base."""

SMALLEST_TOTAL = 1e-6
"""Two weights of NuSLERP whose sum is smaller than this meet half way."""

RESOLUTION = 1e-7
"""Lengths of sums of unit vectors below this are rounding: they are roots of differences of float64."""


def _with_base(sources: Sources, factors: Sequence[float], out: Tensor) -> None:
    """Write the sum of the sources, or the base plus the sum of the deltas if there is one, to `out`."""
    if sources.base is None:
        weighted_sum(sources.tensors, factors, out)
    else:
        weighted_sum((sources.base, *sources.tensors), (1.0 - math.fsum(factors), *factors), out)


@kernel("nuslerp")
class NuSlerp(Kernel):
    """`sin((1 - t) w) / sin w v1 + sin(t w) / sin w v2`, `w` the angle of flat tensors or of slices."""

    prepared_by = ("nuslerp_flatten", "nuslerp_row_wise")

    def prepare(self, sources: Sources, values: Values) -> Tensor:
        """Return the cosine between the two sources or deltas, of each slice or of all in one, in float64."""
        if values.method["nuslerp_flatten"]:
            found = rays(sources)
            shorter = [length / max(length, SMALLEST_LENGTH) for length in found.lengths]
            return torch.tensor([found.cosines[0][1] * shorter[0] * shorter[1]], dtype=torch.float64)
        slices = Slices.of(sources.tensors[0], bool(values.method["nuslerp_row_wise"]))
        lengths = [slices.dots(sources, i, i).sqrt().clamp(min=SMALLEST_LENGTH) for i in (0, 1)]
        return (slices.dots(sources, 0, 1) / lengths[0] / lengths[1]).clamp(-1.0, 1.0)

    def merge(self, sources: Sources, prepared: Tensor, values: Values, out: Tensor) -> None:  # noqa: D102
        first, second = values.numbers("weight")
        t = 0.5 if abs(first + second) < SMALLEST_TOTAL else second / (first + second)
        # Parts are too small for torch to divide them among threads, which would change an arc's last bit.
        arcs = [_arc(t, part) for part in torch.split(prepared, ROW_ELEMENTS)]
        factors = [torch.cat([arc[k] for arc in arcs]) for k in (0, 1)]
        if values.method["nuslerp_flatten"]:
            _with_base(sources, [float(factor) for factor in factors], out)
            return
        slices = Slices.of(out, bool(values.method["nuslerp_row_wise"]))
        if sources.base is None:
            slices.weighted_sum(sources.tensors, factors, out)
        else:
            rest = 1.0 - (factors[0] + factors[1])
            slices.weighted_sum((sources.base, *sources.tensors), (rest, *factors), out)


def _arc(t: float, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of both ends at `t` of the way along the great circles of these cosines."""
    straight = ((1.0 - cosine) * (1.0 + cosine)).sqrt() < SMALLEST_SINE
    angle = torch.acos(cosine.masked_fill(straight, 0.0))
    first, second = torch.sin((1.0 - t) * angle), torch.sin(t * angle)
    sine = torch.sin(angle)
    return (first / sine).masked_fill(straight, 1.0 - t), (second / sine).masked_fill(straight, t)


@kernel("multislerp")
class MultiSlerp(Kernel):
    """The weighted mean of directions, times the weighted sum of lengths.

    mergekit projects the sources to the tangent space at their own weighted mean direction, where their
    weighted sum is zero by construction; what is left of its formula is that direction.
    """

    def prepare(self, sources: Sources, values: Values) -> Rays:
        """Return lengths and cosines of the sources or deltas."""
        return rays(sources)

    def merge(self, sources: Sources, prepared: Rays, values: Values, out: Tensor) -> None:
        """Write the mean to `out`.

        Raises:
            CandidateError: Three or more directions cancel out, or the weights do, so there is no mean.
        """
        if len(sources.tensors) == 1:
            weighted_sum(sources.tensors, (1.0,), out)
            return
        weights = shares(values.numbers("weight"), bool(values.method["normalize_weights"]))
        _with_base(sources, self._factors(prepared, weights, values.number("eps"), sources.place.name), out)

    def _factors(self, prepared: Rays, weights: list[float], eps: float, name: str) -> list[float]:
        lengths = prepared.lengths
        steps = [
            weight * length / (length + eps) if length else 0.0
            for weight, length in zip(weights, lengths, strict=True)
        ]
        reach = math.fsum(abs(step) for step in steps)
        mean = _length(steps, prepared.cosines)
        if not reach:
            return [0.0] * len(weights)
        if mean <= max(eps, RESOLUTION * reach):
            if len(weights) == 2:
                return weights
            raise CandidateError(
                f"tensor {name}: the sources' directions cancel out with weights {weights}, so they have no "
                "mean; use other weights"
            )
        scale = math.fsum(weight * length for weight, length in zip(weights, lengths, strict=True))
        return [
            scale * (step / mean) / length if length else 0.0
            for step, length in zip(steps, lengths, strict=True)
        ]


@kernel("karcher")
class Karcher(Kernel):
    """The point of the unit sphere with the least squared angles to the sources, times their mean length.

    The iteration runs on coefficients of the sources' unit vectors, with their cosines as the metric.
    """

    def prepare(self, sources: Sources, values: Values) -> Rays:
        """Return lengths and cosines of the sources."""
        return rays(sources)

    def merge(self, sources: Sources, prepared: Rays, values: Values, out: Tensor) -> None:
        """Write the mean to `out`.

        Raises:
            CandidateError: All weights are zero.
        """
        weights, tol = shares(values.numbers("weight"), True), values.number("tol")
        used = [
            i for i, length in enumerate(prepared.lengths) if not length <= tol
        ]  # also those that are nan
        factors = [0.0] * len(weights)
        whole = math.fsum(weights[i] for i in used)
        if whole > 0.0:
            mean = karcher_mean(
                [[prepared.cosines[i][j] for j in used] for i in used],
                [weights[i] / whole for i in used],
                int(values.number("max_iter")),
                tol,
            )
            scale = math.fsum(w * length for w, length in zip(weights, prepared.lengths, strict=True))
            for i, coefficient in zip(used, mean, strict=True):
                factors[i] = scale * coefficient / prepared.lengths[i]
        weighted_sum(sources.tensors, factors, out)


def karcher_mean(
    cosines: Sequence[Sequence[float]], weights: Sequence[float], steps: int, tol: float
) -> list[float]:
    """Return the weighted Karcher mean of unit vectors, as a combination of them.

    Args:
        cosines: Between the vectors, N by N.
        weights: N numbers of at least 0 with sum 1.
        steps: Most steps of the iteration.
        tol: Angle in radians below which a vector does not pull and a step ends the iteration.

    Returns:
        N coefficients, whose combination has length 1.
    """
    start = _length(weights, cosines)
    if start <= max(tol, RESOLUTION):
        mean = [float(i == 0) for i in range(len(weights))]
    else:
        mean = [weight / start for weight in weights]
    for _ in range(steps):
        near = [math.fsum(c * x for c, x in zip(row, mean, strict=True)) for row in cosines]
        pulls = [weight * _pull(cosine, tol) for weight, cosine in zip(weights, near, strict=True)]
        back = math.fsum(pull * cosine for pull, cosine in zip(pulls, near, strict=True))
        step = [pull - back * x for pull, x in zip(pulls, mean, strict=True)]
        angle = _length(step, cosines)
        if angle <= tol:
            break
        turned = math.sin(angle) / angle
        mean = [math.cos(angle) * x + turned * s for x, s in zip(mean, step, strict=True)]
        length = _length(mean, cosines)
        mean = [x / length for x in mean] if length > tol else mean
    return mean


def _pull(cosine: float, tol: float) -> float:
    """Return angle / sine, 0 for a vector nearer than `tol`, and for the opposite one, which has no side."""
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    sine = math.sin(angle)
    if angle <= tol or (sine < SMALLEST_SINE and cosine < 0.0):
        return 0.0
    return angle / sine


def _length(coefficients: Sequence[float], cosines: Sequence[Sequence[float]]) -> float:
    """Return the length of a combination of unit vectors."""
    square = math.fsum(
        x * y * cosine
        for x, row in zip(coefficients, cosines, strict=True)
        for y, cosine in zip(coefficients, row, strict=True)
    )
    return math.sqrt(max(0.0, square))


@kernel("model_stock")
class ModelStock(Kernel):
    """`theta_0 + lambda t (mean_i theta_i - theta_0)`, `t = N c / (1 + (N - 1) c)`, `c` the mean cosine."""

    prepared_by = ("filter_wise",)

    def prepare(self, sources: Sources, values: Values) -> Tensor:
        """Return the mean cosine between two deltas, of each slice or of all in one, in float64."""
        pairs = list(combinations(range(len(sources.tensors)), 2))
        if values.method["filter_wise"]:
            slices = Slices.of(sources.tensors[0])
            lengths = [slices.dots(sources, i, i).sqrt() for i in range(len(sources.tensors))]
            cosines = [
                slices.dots(sources, i, j) / (lengths[i] * lengths[j]).clamp(min=SMALLEST_PRODUCT)
                for i, j in pairs
            ]
            total = cosines[0].clamp_(-1.0, 1.0)
            for cosine in cosines[1:]:
                total += cosine.clamp_(-1.0, 1.0)
            return total / len(pairs)
        found = rays(sources)
        products = [found.lengths[i] * found.lengths[j] for i, j in pairs]
        mean = math.fsum(
            found.cosines[i][j] * product / max(product, SMALLEST_PRODUCT)
            for (i, j), product in zip(pairs, products, strict=True)
        )
        return torch.tensor([mean / len(pairs)], dtype=torch.float64)

    def merge(self, sources: Sources, prepared: Tensor, values: Values, out: Tensor) -> None:  # noqa: D102
        count = len(sources.tensors)
        divisor = 1.0 + (count - 1) * prepared
        t = (count * prepared / divisor).masked_fill(divisor.abs() < SMALLEST_DIVISOR, 0.0)
        if values.method["clamp"]:
            t = t.clamp(0.0, 1.0)
        t = t * values.number("lambda")
        tensors = (sources.given_base, *sources.tensors)
        if values.method["filter_wise"]:
            Slices.of(out).weighted_sum(tensors, (1.0 - t, *[t / count] * count), out)
        else:
            share = float(t)
            weighted_sum(tensors, (1.0 - share, *[share / count] * count), out)
