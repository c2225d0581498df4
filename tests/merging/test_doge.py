"""DOGE: the contract against the published loss, differentiated and descended by torch itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.merging.methods import KERNELS, Values
from evomerge.merging.methods.doge import NONE_KEPT, RATE, correction, shared_directions, thresholds
from evomerge.merging.methods.subspaces import Matrix, triplets
from tests.contracts.method import PLACE, Array, Case, Expected, Single, flat, same_bits
from tests.merging.spectra import SpectralContract, doubtful, entries, rotation, singular, weights
from tests.merging.test_spectral import ZERO

Parameters = tuple[dict[str, Any], list[dict[str, Any]]]
EXAMPLE = ([[1.0, 0], [0, 1]], [[0.0, 1], [1, 0]])


def published_loss(deltas: list[Array], scales: Sequence[float], point: Tensor) -> Tensor:
    sources = [torch.tensor(delta) for delta in deltas]
    merged = sum(scale * delta for scale, delta in zip(scales, sources, strict=True))
    loss = torch.zeros((), dtype=torch.float64)
    for delta in sources:
        entry = -delta * merged - delta * (sum(scales) * point) + delta * delta
        loss = loss + entry.sum(dim=1).square().sum()
    return loss


def descended(deltas: list[Array], scales: Sequence[float], shared: Array, steps: int) -> Array:
    point = torch.zeros(deltas[0].shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([point], lr=1e-4)
    outside = torch.tensor(np.eye(len(shared)) - shared @ shared.T)
    for _ in range(steps):
        adam.zero_grad()
        published_loss(deltas, scales, point).backward()
        assert point.grad is not None
        point.grad.copy_(outside @ point.grad)
        adam.step()
    return point.detach().numpy()


class TestDoge(SpectralContract):
    """Corrected and masked deltas."""

    name = "doge"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        base = flat(case.base)
        if case.base.dim() < 2:
            return Expected(base, np.abs(base), np.zeros(base.shape, dtype=bool))
        stack = entries(case)[1]
        masks, unclear = [], np.zeros(stack[0].shape, dtype=bool)
        kept = int(case.number("keep") * base.size)
        for delta in stack:
            sizes = np.abs(delta.astype(np.float32))
            limit = np.sort(sizes, axis=None)[base.size - kept] if kept else np.inf
            masks.append(sizes >= limit)
            assert masks[-1].sum() >= kept
        value, size = np.zeros(stack[0].shape), np.zeros(stack[0].shape)
        for e in range(len(value)):
            deltas = [delta[e] for delta in stack]
            lengths = [np.linalg.norm(delta) for delta in deltas]
            scales = [case.number("eta") / length if length else 0.0 for length in lengths]
            shared, doubt = self.shared(deltas, case.number("subspace"))
            unclear[e] |= doubt
            found = descended(deltas, scales, shared, round(case.number("steps")))
            for i, weight in enumerate(case.numbers("weight")):
                term = weight * scales[i] * masks[i][e] * (deltas[i] + found)
                value[e] += term
                # Adam makes whole steps of gradients that are nothing but rounding.
                moved = np.abs(found).max() + RATE * case.number("steps")
                size[e] += np.abs(term) + abs(weight) * scales[i] * moved
        scale = case.number("lambda")
        return Expected(
            base + scale * value.reshape(-1),
            np.abs(base) + abs(scale) * size.reshape(-1),
            unclear.reshape(-1),
        )

    def shared(self, deltas: list[Array], subspace: float) -> tuple[Array, bool]:
        side = min(deltas[0].shape)
        each, count = side // len(deltas), int(side / subspace)
        stack = np.hstack([singular(delta)[0][:, :each] for delta in deltas])
        if not stack.size or not count:
            return np.zeros((len(stack), 0)), False
        doubt = doubtful(stack, count) or any(doubtful(delta, each) for delta in deltas)
        return singular(stack)[0][:, :count], doubt

    def sensible(self, case: Case) -> Case:
        case = super().sensible(case)
        possible = {"steps": min(case.number("steps"), 12.0), "subspace": max(case.number("subspace"), 1.0)}
        return replace(case, method={**case.method, **possible})

    def turning(self, size: int, seed: int) -> Array:
        """Rows and columns may change places and signs; the loss and the masks are of single entries."""
        generator = np.random.default_rng(seed)
        signs: Array = generator.permutation(np.eye(size)) * generator.choice([-1.0, 1.0], size)
        return signs

    def random_case(self, shape: tuple[int, ...], **changes: Any) -> Case:
        """Return a case with few steps."""
        return super().random_case(shape, **{"steps": 10.0, "keep": 0.5, "subspace": 2.0, **changes})

    def selecting(self, index: int, count: int) -> Parameters:
        raise NotImplementedError

    def averaging(self, count: int) -> Parameters:
        raise NotImplementedError

    @pytest.mark.parametrize("shape", [(), (1,), (7,)], ids=str)
    def test_identical_sources_give_the_source(self, shape: tuple[int, ...]) -> None:
        """No parameters do: what is no matrix stays the base, and matrices are scaled to the norm eta."""
        case = self.random_case(shape, seed=80)
        assert case.base is not None
        assert same_bits(self.merged(case), case.base)

    def test_parameters_that_select_one_source_give_it(self) -> None:
        """Up to its length, with nothing masked and no correction."""
        case = self.random_case((6, 8), seed=81, keep=1.0, steps=0.0, eta=0.25, **{"lambda": 1.0})
        one = replace(case, sources=tuple(weights(0.0, 1.0, 0.0)))
        assert case.base is not None
        scaled = flat(case.base) + 0.25 * case.deltas[1] / np.linalg.norm(case.deltas[1])
        np.testing.assert_allclose(flat(self.merged(one)), scaled, atol=1e-6)

    def test_experts_of_a_tensor_are_merged_one_by_one(self) -> None:
        """Holds where no mask looks at all of them."""
        case = self.random_case((3, 6, 5), seed=41, keep=1.0)
        whole = self.merged(case)
        for e in range(3):
            assert same_bits(whole[e], self.merged(self.expert(case, e)))

    def test_worked_example(self) -> None:
        deltas = [np.array(delta) for delta in EXAMPLE]
        scales = [0.07 / 2**0.5] * 2
        assert scales[0] == pytest.approx(0.04949747, abs=1e-8)
        start = torch.zeros((2, 2), dtype=torch.float64, requires_grad=True)
        loss = published_loss(deltas, scales, start)
        loss.backward()
        assert loss.item() == pytest.approx(3.6138202, abs=1e-7)
        assert start.grad is not None
        np.testing.assert_allclose(start.grad.numpy(), np.full((2, 2), -0.1881899), atol=1e-7)
        state = KERNELS[self.name].prepare(*self.given(self.case(EXAMPLE, base=ZERO, steps=1.0)))[0]
        assert state.scales == pytest.approx(scales)
        np.testing.assert_allclose(state.correction.numpy(), np.full((2, 2), 1e-4), rtol=1e-5)

    def given(self, case: Case) -> Any:
        return case.inputs, Values(case.method, case.sources, case.seed)

    def test_correction_stays_out_of_the_shared_directions(self) -> None:
        deltas = [torch.tensor(d) for d in np.random.default_rng(82).normal(size=(3, 9, 7))]
        shared = shared_directions([triplets(delta).first(2) for delta in deltas], 2)
        assert shared.shape == (9, 2)
        scales = [0.07 / float(delta.norm()) for delta in deltas]
        found = correction(deltas, scales, shared, 1)
        assert float(found.abs().max()) == pytest.approx(1e-4, rel=1e-3)
        expected = descended([delta.numpy() for delta in deltas], scales, shared.numpy(), 25)
        np.testing.assert_allclose(correction(deltas, scales, shared, 25).numpy(), expected, atol=1e-12)

    def test_directions_that_are_shared_equally_are_taken_together_or_not_at_all(self) -> None:
        for seed in range(8):
            turned = torch.tensor(rotation(6, seed))
            parts = [triplets(turned[:, [0, i]].contiguous()) for i in (1, 2)]
            assert shared_directions(parts, 2).shape == (6, 1), "the second and third are each in one part"
            assert shared_directions(parts, 3).shape == (6, 3)
            shared = shared_directions(parts, 1)
            torch.testing.assert_close(shared @ shared.T, torch.outer(turned[:, 0], turned[:, 0]))

    def test_masks_are_of_the_whole_model(self) -> None:
        strong = self.case([np.full((2, 3), 2.0)], base=np.zeros((2, 3)), keep=0.5, steps=0.0)
        weak = self.case([np.full((2, 3), 1.0)], base=np.zeros((2, 3)), keep=0.5, steps=0.0)
        norm = replace(self.random_case((100,), count=1), place=replace(PLACE, role="norm"))
        kernel = KERNELS[self.name]
        views = []
        for case in (strong, weak, norm):
            inputs, values = self.given(case)
            views.append(Single(values, inputs, kernel.prepare(inputs, values)))
        whole = kernel.whole(views)
        results = []
        for view in views[:2]:
            out = torch.empty(2, 3)
            kernel.merge(view.tensors, view.state, replace(view.values, whole=whole), out)
            results.append(out)
        assert bool((results[0] != 0).all())
        assert bool((results[1] == 0).all())

    def test_model_without_a_matrix_is_the_base(self) -> None:
        case = self.random_case((5,), seed=83)
        inputs, values = self.given(case)
        assert KERNELS[self.name].whole([Single(values, inputs, None)]) == ()


def test_thresholds_are_those_of_a_sort() -> None:
    generator = np.random.default_rng(84)
    deltas = [generator.normal(size=(2, 40, 30)).astype(np.float32) for _ in range(2)]
    deltas[1][0, :20] = 0.0
    every = [Matrix(torch.zeros(40, 30), tuple(torch.tensor(d[e]) for d in deltas)) for e in range(2)]
    for keep in (1.0, 0.9, 0.5, 0.25, 1 / 2400, 0.0):
        codes = thresholds(lambda: every, keep)
        for delta, code in zip(deltas, codes, strict=True):
            kept = int(keep * 2400)
            if not kept:
                assert code == NONE_KEPT
                continue
            expected = np.sort(np.abs(delta), axis=None)[2400 - kept]
            assert torch.tensor([code], dtype=torch.int32).view(torch.float32).item() == expected
