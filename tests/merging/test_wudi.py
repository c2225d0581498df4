"""WUDI-Merging and OptMerge: the contract, against torch's own optimizers on the published losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.merging.methods import KERNELS, Values
from evomerge.merging.methods.wudi import Curvature, Factors, flow, heavy_ball, quadratic
from tests.contracts.method import Array, Case, flat, same_bits, scaled
from tests.merging.spectra import SpectralContract, doubtful, singular
from tests.merging.test_spectral import PAIR, ZERO

Loss = Callable[[Tensor], Tensor]
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def loss_of(targets: list[Array], factors: list[Array], case: Case, deltas: list[Array]) -> Loss:
    """Return the published loss with weights: squared norms over the deltas' own, nothing rearranged."""
    terms = [
        (weight, torch.tensor(target), torch.tensor(factor), float((delta**2).sum()))
        for weight, target, factor, delta in zip(
            case.numbers("weight"), targets, factors, deltas, strict=True
        )
        if delta.any()
    ]

    def loss(point: Tensor) -> Tensor:
        parts = [w * ((point - target) @ factor.T).square().sum() / norm for w, target, factor, norm in terms]
        return sum(parts, start=0.0 * point.sum())

    return loss


def descended(start: Array, loss: Loss, optimizer: Optimizer, steps: int) -> Array:
    point = torch.tensor(start, requires_grad=True)
    method = optimizer([point])
    for _ in range(steps):
        method.zero_grad()
        loss(point).backward()
        method.step()
    return point.detach().numpy()


def weighted_sum(deltas: list[Array], case: Case) -> Array:
    return np.sum([w * d for w, d in zip(case.numbers("weight"), deltas, strict=True)], axis=0)


class TestWudi(SpectralContract):
    """Least interference."""

    name = "wudi"

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        start, steps = weighted_sum(deltas, case), case.number("steps")
        if case.method["solver"] == "adam":
            adam: Optimizer = lambda points: torch.optim.Adam(points, lr=1e-5)  # noqa: E731
            return descended(start, loss_of(deltas, deltas, case, deltas), adam, round(steps)), False
        square, pull = np.zeros((start.shape[1],) * 2), np.zeros(start.shape)
        for weight, delta in zip(case.numbers("weight"), deltas, strict=True):
            norm = (delta**2).sum() or 1.0
            square += weight * delta.T @ delta / norm
            pull += weight * delta @ delta.T @ delta / norm
        values, vectors = np.linalg.eigh(square)
        kept = values > 1e-11
        doubt = bool(((values > 1e-14) & (values < 1e-8)).any())
        vectors, values = vectors[:, kept], values[kept]
        target = pull @ vectors / values  # the minimum, in the space that the sources span
        way = (target - start @ vectors) * (1.0 - np.exp(-values * steps))
        return start + way @ vectors.T, doubt

    def sensible(self, case: Case) -> Case:
        case = super().sensible(case)
        few = min(case.number("steps"), 25.0)
        return (
            replace(case, method={**case.method, "steps": few}) if case.method["solver"] == "adam" else case
        )

    EXAMPLE: ClassVar = ([[2.0, 0]], [[1.0, 1]])

    @pytest.mark.parametrize(
        ("time", "merged"),
        [(0.0, [3.0, 1.0]), (1.0, [2.06443416, 0.46374582]), (1000.0, [2.0, 0.0])],
    )
    def test_worked_example_of_the_flow(self, time: float, merged: list[float]) -> None:
        case = self.case(self.EXAMPLE, base=np.zeros((1, 2)), steps=time)
        np.testing.assert_allclose(flat(self.merged(case)), merged, atol=1e-6)

    def test_worked_example_of_the_loss_by_products(self) -> None:
        case = self.case(self.EXAMPLE, base=np.zeros((1, 2)))
        state = KERNELS[self.name].prepare(case.inputs, Values(case.method, case.sources, 0))[0]
        slope = state.weighted([1.0, 1.0])
        np.testing.assert_allclose(slope.square.numpy(), [[1.5, 0.5], [0.5, 0.5]])
        np.testing.assert_allclose(slope.pull.numpy(), [[3.0, 1.0]])

    @pytest.mark.parametrize("solver", ["flow", "adam"])
    @pytest.mark.parametrize("shape", [(3, 40), (9, 7)])
    def test_wide_and_tall_matrices_are_descended_alike(self, shape: tuple[int, ...], solver: str) -> None:
        case = self.random_case(shape, seed=61, solver=solver, steps=40.0)
        assert isinstance(self.prepared(case)[0], Factors if shape == (3, 40) else Curvature)
        expected = self.expected(case)
        np.testing.assert_allclose(flat(self.merged(case)), expected.value, atol=1e-6)

    def test_longer_flow_interferes_less_with_every_source_on_the_whole(self) -> None:
        case = self.random_case((8, 10), seed=62)
        assert case.base is not None
        deltas = [delta.reshape(8, 10) for delta in case.deltas]
        loss, found = loss_of(deltas, deltas, case, deltas), []
        for time in (0.0, 1.0, 10.0, 100.0):
            result = self.merged(replace(case, method={**case.method, "steps": time}))
            found.append(float(loss(result.double() - case.base.double())))
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.7 * found[0]

    def test_one_source_is_given_back_whatever_the_time(self) -> None:
        case = self.random_case((8, 10), count=1, seed=63, **scaled(1.0))
        one = replace(case, sources=({"weight": 1.0},))
        torch.testing.assert_close(self.merged(one), case.tensors[0], rtol=1e-6, atol=1e-6)

    def test_adam_moves_no_entry_further_than_its_rate_allows(self) -> None:
        case = self.random_case((8, 10), seed=64, solver="adam", steps=30.0)
        still = replace(case, method={**case.method, "steps": 0.0})
        moved = (self.merged(case).double() - self.merged(still).double()).abs()
        assert 1e-4 < float(moved.max()) < 30 * 1e-5 + 1e-6


class TestOptMerge(SpectralContract):
    """Low-rank targets."""

    name = "optmerge"

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        count = len(deltas)
        rank = max(1, int(case.number("rank") * min(deltas[0].shape) / count))
        top = [(left[:, :rank], values[:rank], right[:rank]) for left, values, right in map(singular, deltas)]
        targets = [left * values @ right for left, values, right in top]
        factors = [values[:, None] * right for _, values, right in top]
        rate = case.number("learning_rate")
        sgd: Optimizer = lambda points: torch.optim.SGD(points, lr=rate, momentum=0.9)  # noqa: E731
        start = weighted_sum(deltas, case) / count
        loss = loss_of(targets, factors, case, deltas)
        doubt = any(doubtful(delta, rank) for delta in deltas)
        return descended(start, loss, sgd, round(case.number("steps"))), doubt

    def sensible(self, case: Case) -> Case:
        case = super().sensible(case)
        return replace(case, method={**case.method, "steps": min(case.number("steps"), 60.0)})

    def random_case(self, shape: tuple[int, ...], **changes: Any) -> Case:
        """Return a case that moves further than the default does."""
        return super().random_case(shape, **{"steps": 40.0, "learning_rate": 0.01, **changes})

    def test_worked_example(self) -> None:
        case = self.case(PAIR, base=ZERO)
        state = KERNELS[self.name].prepare(case.inputs, Values(case.method, case.sources, 0))[0]
        slope = state.weighted([1.0, 1.0])
        np.testing.assert_allclose(slope.square.numpy(), [[1.30117647, 0.48], [0.48, 0.64]], atol=1e-8)
        np.testing.assert_allclose(slope.pull.numpy(), [[3.76470588, 0], [1.8, 2.4]], atol=1e-8)
        mean = torch.tensor(PAIR, dtype=torch.float64).mean(dim=0)
        gradient = -2.0 * slope.residual(mean).numpy()
        np.testing.assert_allclose(gradient, [[-2.32470588, 1.92], [0.37411765, -1.76]], atol=1e-8)

    def test_long_descent_ends_at_the_minimum(self) -> None:
        case = self.case(PAIR, base=ZERO, steps=1000.0, learning_rate=0.125)
        np.testing.assert_allclose(self.merged(case).numpy(), [[4, -3], [0, 3.75]], atol=1e-5)

    def test_default_stays_near_the_mean(self) -> None:
        case = self.random_case((20, 30), seed=65, steps=300.0, learning_rate=1e-4)
        assert case.base is not None
        mean = weighted_sum(case.deltas, case) / 3
        moved = np.linalg.norm(flat(self.merged(case)) - flat(case.base) - mean)
        assert 0 < moved < 0.15 * np.linalg.norm(mean)


def test_both_forms_of_a_loss_have_the_same_slope_and_the_same_end() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    images = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    wide = quadratic(rows, images)
    assert isinstance(wide, Factors)
    tall = Curvature(
        tuple(row.T @ row for row in rows),
        tuple(image @ row for image, row in zip(images, rows, strict=True)),
    )
    first, second = (form.weighted([0.5, 2.0]) for form in (wide, tall))
    point = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(first.residual(point), second.residual(point))
    for reach in (flow(3.0), heavy_ball(20, 0.01, 0.9)):
        torch.testing.assert_close(first.moved(point, reach), second.moved(point, reach))


def test_reach_where_the_loss_is_flat_is_the_time() -> None:
    flat_and_steep = torch.tensor([0.0, 1e-300, 1e-9, 50.0], dtype=torch.float64)
    found = flow(7.0)(flat_and_steep)
    np.testing.assert_allclose(found.numpy(), [7.0, 7.0, 7.0, 1 / 50], rtol=1e-7)
    assert flow(0.0)(flat_and_steep).tolist() == [0.0] * 4


def test_solver_changes_the_result_and_state_serves_both() -> None:
    contract = TestWudi()
    first = contract.random_case((8, 10), seed=66, steps=20.0)
    second = replace(first, method={**first.method, "solver": "adam"})
    state = contract.prepared(first)
    assert same_bits(contract.merged(second, prepared=state), contract.merged(second))
    assert not same_bits(contract.merged(second), contract.merged(first))
