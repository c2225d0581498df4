"""Merging LoRA adapters as adapters: weighted sum, LoRA-LEGO, reversible merging, and extraction by SVD.

All work on factors in float64 and never form the m x k delta they stand for, save `extract`, which starts
from one. A delta is `up @ down`; its scale (`alpha/r` or `alpha/sqrt(r)`) is in `up`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.catalogue.adapters import ExtractSettings, LegoSettings, MergeSettings, Settings, SumSettings
from evomerge.checkpoints import opening
from evomerge.checkpoints.adapters import Adapter, factor_names, peft_config, write_adapter
from evomerge.checkpoints.files import broken
from evomerge.checkpoints.writer import check_target
from evomerge.errors import SourceError
from evomerge.merging.merger import DTYPES
from evomerge.seeding import stream

Floats = NDArray[np.float64]

_STARTS, _ROUNDS = 10, 300  # of K-means; the best start counts


@dataclass(frozen=True, slots=True)
class LowRank:
    """A delta in factors: `up @ down`.

    Attributes:
        up: Factor B with the scale in it, (m, r), float64.
        down: Factor A, (r, k), float64.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Columns of `up` and rows of `down`; the delta's true rank may be lower."""
        return self.up.shape[1]


@dataclass(frozen=True, slots=True)
class Fit:
    """A low-rank result and how much was given up for it.

    Attributes:
        factors: The result.
        lost: Sum of squares of what is not in it: of the delta, or of the vectors that were fitted.
        whole: Sum of squares of what it stands for.
    """

    factors: LowRank
    lost: float
    whole: float


def relative_error(lost: float, whole: float) -> float:
    """Return `sqrt(lost / whole)`, in [0, 1]; 0 where there was nothing to lose."""
    return math.sqrt(min(1.0, lost / whole)) if whole else 0.0


def weighted_delta(parts: Sequence[LowRank], weights: Sequence[float], rank: int | None = None) -> Fit:
    """Return the best approximation of a rank to `sum_i weights[i] * up_i @ down_i` (Eckart and Young).

    QR of the stacked factors and an SVD of what is between them: O((m + k) R^2) for R the sum of ranks. The
    factors share the singular values evenly. Unlike a weighted mean of the A and of the B, no product of one
    adapter's B with another's A comes in.

    Args:
        parts: At least one, all of the same m and k.
        weights: Factor of each delta.
        rank: Largest rank of the result; None, or the sum of ranks or more: the sum is exact.

    Returns:
        The result, of rank `min(rank, R, m, k)`; `lost` and `whole` are squared norms of deltas.
    """
    up = torch.cat([part.up * weight for part, weight in zip(parts, weights, strict=True)], dim=1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(torch.cat([part.down for part in parts]).T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    kept = min(len(values), rank or len(values))
    root = values[:kept].sqrt()
    factors = LowRank(q_up @ (left[:, :kept] * root), (root[:, None] * right[:kept]) @ q_down.T)
    squares = values.square()
    return Fit(factors, float(squares[kept:].sum()), float(squares.sum()))


def lego(
    parts: Sequence[LowRank],
    weights: Sequence[float],
    rank: int,
    *,
    seed: int = 0,
    reweight: bool = False,
    purpose: str = "",
) -> Fit:
    """Return the centroids of the adapters' rank-one units (LoRA-LEGO, arXiv 2409.16167).

    The units (row of A, column of B) of all adapters are pooled and put into `rank` clusters by K-means; each
    cluster's mean is one unit of the result. Ours: a unit's halves are given equal norms first, and distances
    disregard its sign, because `(c*a, b/c)` and `(-a, -b)` stand for the same delta as `(a, b)`; units of a
    zero delta are left out.

    Args:
        parts: At least one, all of the same m and k; ranks may differ.
        weights: Factor of each delta.
        rank: Number of clusters; from the number of units on, every unit is kept and the sum is exact.
        seed: Of K-means.
        reweight: Give each centroid the mean norm of its units, which averaging shrinks. The paper reweights
            too, in two ways whose constants could not be verified; this is not claimed to be either.
        purpose: Names the random stream, besides the seed.

    Returns:
        The result; `lost` and `whole` are the squares within clusters and in all.
    """
    halves = [_units(part, weight) for part, weight in zip(parts, weights, strict=True)]
    ups, downs = (torch.cat([half[i] for half in halves]) for i in (0, 1))
    if not len(ups):
        part = parts[0]
        return Fit(LowRank(torch.zeros_like(part.up[:, :1]), torch.zeros_like(part.down[:1])), 0.0, 0.0)
    units = torch.cat([ups, downs], dim=1)
    # Distances depend on inner products alone, so each unit is turned into as few coordinates as units.
    points = torch.linalg.qr(units.T)[1].T.numpy()
    members, lost = _clusters(points, min(rank, len(points)), seed, purpose)
    means = members / np.abs(members).sum(axis=1, keepdims=True)
    if reweight:
        norms = np.linalg.norm(points, axis=1)
        got = np.linalg.norm(means @ points, axis=1)
        wanted = np.abs(means) @ norms
        means *= np.divide(wanted, got, out=np.ones_like(got), where=got > 0)[:, None]
    mixed = torch.from_numpy(means)
    return Fit(LowRank((mixed @ ups).T, mixed @ downs), lost, float(np.square(points).sum()))


def _units(part: LowRank, weight: float) -> tuple[Tensor, Tensor]:
    """Return the units of a weighted delta as rows (r, m) and (r, k) of equal norms, without zero ones."""
    ups, downs = part.up.T, part.down
    up_norms, down_norms = ups.norm(dim=1), downs.norm(dim=1)
    there = (up_norms > 0) & (down_norms > 0) & (weight != 0)
    ups, downs, up_norms, down_norms = ups[there], downs[there], up_norms[there], down_norms[there]
    wanted = (abs(weight) * up_norms * down_norms).sqrt()
    sign = math.copysign(1.0, weight)
    return ups * (sign * wanted / up_norms)[:, None], downs * (wanted / down_norms)[:, None]


def _clusters(points: Floats, count: int, seed: int, purpose: str) -> tuple[Floats, float]:
    """Return the best K-means clustering of points whose signs do not count, and its squares within clusters.

    The clustering is a matrix (count, points): 1 or -1 where a point or its negative is a member, else 0.
    """
    best, least = np.eye(count, len(points)), math.inf
    for start in range(_STARTS):
        chosen = stream(seed, "lego", purpose, start).permutation(len(points))[:count]
        members, lost = _lloyd(points, points[chosen])
        if lost < least:
            best, least = members, lost
    return best, least


def _lloyd(points: Floats, centres: Floats) -> tuple[Floats, float]:
    """Assign and average in turn (Lloyd 1982) until nothing moves; no cluster is left without a member."""
    every, members = np.arange(len(points)), np.zeros((len(centres), len(points)))
    for _ in range(_ROUNDS):
        squares = _squares(points, centres)
        nearest = squares.argmin(axis=1)
        lone = squares[every, nearest]
        for empty in np.setdiff1d(np.arange(len(centres)), nearest):
            shared = np.bincount(nearest, minlength=len(centres))[nearest] > 1
            nearest[np.where(shared, lone, -1.0).argmax()] = empty
        assigned = np.zeros_like(members)
        assigned[nearest, every] = np.where((points * centres[nearest]).sum(axis=1) < 0, -1.0, 1.0)
        centres = assigned @ points / np.abs(assigned).sum(axis=1, keepdims=True)
        if np.array_equal(assigned, members):
            break
        members = assigned
    return members, float(np.square(points - members.T @ centres).sum())


def _squares(points: Floats, centres: Floats) -> Floats:
    """Return the squared distance of each point, or of its negative if that is nearer, to each centre."""
    products = np.abs(points @ centres.T)
    sums = np.square(points).sum(axis=1)[:, None] + np.square(centres).sum(axis=1)
    squares: Floats = np.maximum(sums - 2 * products, 0.0)
    return squares


@dataclass(frozen=True, slots=True)
class Basis:
    """Vectors of several adapters at each position, as a mean and components with coefficients.

    Attributes:
        mean: (positions, r).
        components: (positions, p, r), orthonormal at each position; their signs are arbitrary.
        coefficients: (positions, n, p): each adapter's place along the components.
    """

    mean: Tensor
    components: Tensor
    coefficients: Tensor

    def at(self, weights: Tensor) -> Tensor:
        """Return `mean + sum_i weights[i] * coefficients_i @ components`, (positions, r), for weights (n)."""
        place = torch.einsum("i,xip->xp", weights, self.coefficients)
        return self.mean + torch.einsum("xp,xpr->xr", place, self.components)


@dataclass(frozen=True, slots=True)
class ReversibleLora:
    """Adapters of one rank over a shared basis, from which each can be had back.

    Reversible model merging (RMM, arXiv 2510.14163): at each position, a row of B or a column of A, the
    r-vectors of the n adapters are fitted by a mean and p components. That stores p(r + n) + r numbers for a
    position in place of r*n. The paper's derivation could not be verified; a mean-centred PCA is used here.

    Attributes:
        up: The rows of B.
        down: The columns of A.
        lost: Sum of squares of what the components do not hold.
        whole: Sum of squares about the mean.
    """

    up: Basis
    down: Basis
    lost: float
    whole: float

    @classmethod
    def fit(cls, parts: Sequence[LowRank], components: int) -> ReversibleLora:
        """Fit a basis.

        Args:
            parts: At least two, all of the same m, k and rank.
            components: Number p of components; `min(n - 1, r)` or more gives every adapter back exactly.
        """
        up, up_lost, up_whole = _principal(torch.stack([part.up for part in parts], dim=1), components)
        rows = torch.stack([part.down.T for part in parts], dim=1)
        down, down_lost, down_whole = _principal(rows, components)
        return cls(up, down, up_lost + down_lost, up_whole + down_whole)

    def member(self, index: int) -> LowRank:
        """Return one adapter as the basis holds it."""
        weights = [0.0] * self.up.coefficients.shape[1]
        weights[index] = 1.0
        return self.point(weights)

    def point(self, weights: Sequence[float]) -> LowRank:
        """Return a point of the space that the adapters span.

        Args:
            weights: How much of each adapter's deviation from the mean, in both factors: one 1 among zeros is
                that adapter, zeros or equal weights are the mean. Points between adapters lie on the line
                between their factors, which is not the line between their deltas.
        """
        given = torch.tensor(list(weights), dtype=torch.float64)
        return LowRank(self.up.at(given), self.down.at(given).T)


def _principal(vectors: Tensor, components: int) -> tuple[Basis, float, float]:
    """Return the mean and components of vectors (positions, n, r), the squares not held, and all about it."""
    mean = vectors.mean(dim=1)
    left, values, right = torch.linalg.svd(vectors - mean[:, None], full_matrices=False)
    kept = min(components, values.shape[1])
    squares = values.square()
    basis = Basis(mean, right[:, :kept], left[:, :, :kept] * values[:, None, :kept])
    return basis, float(squares[:, kept:].sum()), float(squares.sum())


def extract(delta: Tensor, rank: int) -> Fit:
    """Return the best approximation of a rank to a full delta (Eckart and Young).

    By the eigenvectors of the smaller of `delta @ delta.T` and `delta.T @ delta`: O(m k min(m, k)).

    Args:
        delta: (m, k), any floating dtype.
        rank: Largest rank of the result.

    Returns:
        The result, of rank `min(rank, m, k)`; the factors share the singular values evenly.
    """
    wide = delta.double()
    if wide.shape[0] > wide.shape[1]:
        fit = extract(wide.T, rank)
        return Fit(LowRank(fit.factors.down.T, fit.factors.up.T), fit.lost, fit.whole)
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = min(rank, len(squares))
    # A floor keeps the root of a singular value 0 a divisor; it does not change the product.
    root = squares[len(squares) - kept :].flip(0).clamp(min=1e-200).pow(0.25)
    basis = vectors[:, len(squares) - kept :].flip(1)
    factors = LowRank(basis * root, (basis.T @ wide) / root[:, None])
    lost = (wide - factors.up @ factors.down).square().sum()
    return Fit(factors, float(lost), float(wide.square().sum()))


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapter that was written.

    Attributes:
        path: Its folder.
        modules: Module to rank and relative error.
        error: The relative error of all modules together.
        left_out: Tensors of a fine-tuned model that differ from the base's and are not in it.
    """

    path: Path
    modules: dict[str, tuple[int, float]]
    error: float
    left_out: tuple[str, ...]


def merge_adapters(settings: Settings, base_dir: Path, target: Path) -> Merged:
    """Merge adapters, or extract one, and write the result as an adapter folder that peft loads.

    Args:
        settings: As in the file of `merge-adapters`.
        base_dir: What relative folders in them are relative to.
        target: The folder to make; it must not exist.

    Raises:
        UserError: The target cannot be made, a source is missing or broken, or they do not fit together.
    """
    check_target(target)
    left_out: list[str] = []
    made: Iterator[tuple[str, bool, Fit]]
    ref = settings.base
    if isinstance(settings, ExtractSettings):
        before, after = (
            opening.open_checkpoint(r.path, r.revision, base_dir) for r in (settings.base, settings.model)
        )
        transposed = opening.is_transposed(before, "c_attn")
        deltas = opening.changed_matrices(before, after, settings.modules, left_out)
        made = ((module, False, extract(delta, settings.rank)) for module, delta in deltas)
    else:
        adapters = opening.open_adapters([(r.path, r.revision) for r in settings.adapters], base_dir)
        transposed = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
        made = _combined(settings, adapters)
    base, revision = (
        (opening.located(ref.path, base_dir), ref.revision) if ref else opening.shared_base(adapters)
    )
    tensors: dict[str, Tensor] = {}
    modules: dict[str, tuple[int, float]] = {}
    lost, whole = 0.0, 0.0
    for module, embedding, fit in made:
        names = factor_names(module, embedding)
        for name, factor in zip(names, (fit.factors.down, fit.factors.up), strict=True):
            tensors[name] = factor.to(DTYPES[settings.dtype])
            if not bool(tensors[name].isfinite().all()):
                raise SourceError(f'module "{module}" does not fit into {settings.dtype}; choose float32')
        modules[module] = (fit.factors.rank, relative_error(fit.lost, fit.whole))
        lost, whole = lost + fit.lost, whole + fit.whole
    if not modules:
        raise SourceError("nothing to extract: no matrix of the layers differs from the base's")
    ranks = {module: rank for module, (rank, _) in modules.items()}
    config = peft_config(ranks, base, revision, transposed=transposed)
    path = write_adapter(target, config, tensors)
    return Merged(path, modules, relative_error(lost, whole), tuple(left_out))


def _combined(settings: MergeSettings, adapters: Sequence[Adapter]) -> Iterator[tuple[str, bool, Fit]]:
    """Yield each module, whether it is an embedding, and its merged delta."""
    weights = [ref.weight for ref in settings.adapters]
    for module in sorted({module for adapter in adapters for module in adapter.targets}):
        found = {
            i: adapter.targets[module] for i, adapter in enumerate(adapters) if module in adapter.targets
        }
        parts = {i: LowRank(*adapters[i].factors(target)) for i, target in found.items()}
        for i, part in parts.items():
            if not bool(part.up.isfinite().all() and part.down.isfinite().all()):
                raise broken(adapters[i].path, f'module "{module}" holds NaN or infinity')
        present = list(parts.values())
        own = [weights[i] for i in parts]
        if isinstance(settings, SumSettings):
            fit = weighted_delta(present, own, settings.rank)
        elif isinstance(settings, LegoSettings):
            k, seed, reweight = settings.rank, settings.seed, settings.reweight
            fit = lego(present, own, k, seed=seed, reweight=reweight, purpose=module)
        else:
            zero = LowRank(torch.zeros_like(present[0].up), torch.zeros_like(present[0].down))
            every = [parts.get(i, zero) for i in range(len(adapters))]
            odd = next((i for i, part in enumerate(every) if part.rank != zero.rank), None)
            if odd is not None:
                problem = (
                    f'module "{module}": expected rank {zero.rank} as in the others, got {every[odd].rank}'
                )
                raise broken(adapters[odd].path, f"{problem}; rmm takes adapters of one rank")
            space = ReversibleLora.fit(every, settings.components)
            fit = Fit(space.point(weights), space.lost, space.whole)
        yield module, next(iter(found.values())).embedding, fit
