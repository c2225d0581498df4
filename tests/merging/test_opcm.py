"""OPCM: the contract against the published sequence, which rescales the model after every source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.merging.methods.opcm import projected
from tests.contracts.method import PLACE, Array, Case, Expected, Single, flat, same_bits, scaled
from tests.merging.spectra import NOISE, SpectralContract, doubtful, entries, rotation, weights

EXAMPLE: tuple[Any, Any] = (np.diag([3.0, 2, 1]), [[1.0, 2, 3], [2, 1, 4], [3, 4, 1]])


def new_part(merged: Array, delta: Array, alpha: float) -> tuple[Array, bool]:
    """Return the projection with full square singular vectors, and whether rounding may turn it."""
    left, values, right = np.linalg.svd(merged)
    if not values[0]:
        return delta, False
    rank = int((values > np.sqrt(max(merged.shape)) * NOISE * values[0]).sum())
    shares = np.cumsum(values[:rank]) / values[:rank].sum()
    closed = int((shares <= alpha + 1e-9).sum())
    inner = left.T @ delta @ right.T
    inner[np.arange(rank), np.arange(rank)] = 0.0
    inner[:closed, :closed] = 0.0
    gaps = values[: rank - 1] - values[1:rank]
    doubt = doubtful(merged, 10**9) or bool((gaps < 1e-5 * values[0]).any())
    return left @ inner @ right, doubt or bool((np.abs(shares - alpha) < 1e-6).any() and 0 < alpha < 1)


@dataclass
class Tensors:
    """Tensors of one model, merged as the merger does."""

    cases: list[Case]

    def merged(self) -> list[torch.Tensor]:
        kernel = KERNELS["opcm"]
        views = []
        for case in self.cases:
            values = Values(case.method, case.sources, 0)
            views.append(Single(values, case.inputs, kernel.prepare(case.inputs, values)))
        whole, results = kernel.whole(views), []
        for view in views:
            assert view.tensors.base is not None
            out = torch.empty_like(view.tensors.base)
            kernel.merge(view.tensors, view.state, replace(view.values, whole=whole), out)
            results.append(out)
        return results


class TestOPCM(SpectralContract):
    """One source after another."""

    name = "opcm"

    def expected(self, case: Case) -> Expected:
        """Follow the paper: rescale the merged delta after each source, and back before the next."""
        assert case.base is not None
        factors = case.numbers("weight")
        if case.base.dim() < 2:
            stack = [delta.reshape(1, 1, -1) for delta in case.deltas]
        else:
            stack = entries(case)[1]
        own = [weight * delta for weight, delta in zip(factors, stack, strict=True)]
        merged, scale, norms, doubt = own[0], 1.0, [np.linalg.norm(own[0])], False
        for delta in own[1:]:
            parts = []
            for before, part in zip(merged, delta, strict=True):
                if case.base.dim() < 2:
                    parts.append(part)
                    continue
                found, turned = new_part(before, part, case.number("alpha"))
                parts.append(found)
                doubt |= turned
            total = scale * merged + np.array(parts)
            norms.append(np.linalg.norm(delta))
            length = np.linalg.norm(total)
            scale = length / np.mean(norms) if np.mean(norms) else 1.0
            doubt |= bool(0 < length < 1e-4 * max(norms))
            merged = total / scale if scale else 0.0 * total
            scale = scale or 1.0
        value = case.number("lambda") * merged.reshape(-1)
        size = np.abs(flat(case.base)) + abs(case.number("lambda")) * (
            np.abs(merged.reshape(-1)) + sum(norms)
        )
        return Expected(flat(case.base) + value, size, np.full(value.shape, doubt))

    def test_experts_of_a_tensor_are_merged_one_by_one(self) -> None:
        """Holds up to the scale, which is that of the whole model."""
        case = self.random_case((3, 6, 5), seed=41)
        assert case.base is not None
        whole = (self.merged(case) - case.base).double()
        alone = torch.stack([self.merged(self.expert(case, e)) - self.expert_base(case, e) for e in range(3)])
        ratio = whole / alone
        for e in range(3):
            torch.testing.assert_close(ratio[e], ratio[e, 0, 0].expand(6, 5), rtol=1e-4, atol=0)

    def expert_base(self, case: Case, e: int) -> torch.Tensor:
        assert case.base is not None
        return case.base[e]

    @pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
    def test_order_of_the_sources_changes_nothing_beyond_rounding(self, order: tuple[int, ...]) -> None:
        """Holds for tensors that are no matrices; for matrices the order is a parameter."""
        case = self.random_case((200,), seed=3)
        torch.testing.assert_close(
            self.merged(self.permuted(case, order)), self.merged(case), rtol=1e-5, atol=1e-6
        )
        case = self.random_case((10, 20), seed=3)
        assert not torch.allclose(self.merged(self.permuted(case, order)), self.merged(case), atol=1e-3)

    def test_prepared_state_serves_any_number_of_candidates(self) -> None:
        """Of the same `alpha` and weights, which decide the projections."""
        case = self.random_case((3, 7_000), seed=7)
        other = replace(case, method={**case.method, "lambda": 0.5})
        state = self.prepared(case)
        first = self.merged(case, prepared=state)
        assert same_bits(self.merged(other, prepared=state), self.merged(other))
        assert same_bits(first, self.merged(case))
        assert same_bits(first, self.merged(case, prepared=state))

    RESULTS: ClassVar = [
        (
            0.5,
            [[0, 2, 3], [2, 0, 4], [3, 4, 0]],
            [[2.042108, 1.361405, 2.042108], [1.361405, 1.361405, 2.722811], [2.042108, 2.722811, 0.680703]],
        ),
        (
            0.9,
            [[0, 0, 3], [0, 0, 4], [3, 4, 0]],
            np.array([[3, 0, 3], [0, 2, 4], [3, 4, 1]]) / 1.38505269,
        ),
    ]

    @pytest.mark.parametrize(("alpha", "added", "merged"), RESULTS)
    def test_worked_example(self, alpha: float, added: Any, merged: Any) -> None:
        first, second = (torch.tensor(np.array(part), dtype=torch.float64) for part in EXAMPLE)
        np.testing.assert_allclose(projected(first, second, alpha).numpy(), added, atol=1e-12)
        case = self.case(EXAMPLE, base=np.zeros((3, 3)), alpha=alpha)
        np.testing.assert_allclose(self.merged(case).numpy(), merged, atol=2e-6)

    @pytest.mark.parametrize("seed", range(8))
    def test_share_that_alpha_hits_exactly_is_closed_whatever_the_frame(self, seed: int) -> None:
        first, second = np.diag([5.0, 4, 3.5, 3, 2.5]), np.arange(25.0).reshape(5, 5)
        left, right = rotation(5, seed), rotation(5, seed + 100)
        found = projected(torch.tensor(left @ first @ right), torch.tensor(left @ second @ right), 0.5)
        new = second - np.diag(np.diag(second))
        new[:2, :2] = 0.0
        np.testing.assert_allclose(found.numpy(), left @ new @ right, atol=1e-11)

    def test_one_source_is_given_back(self) -> None:
        case = self.random_case((8, 10), count=1, seed=70, **scaled(1.0))
        one = replace(case, sources=({"weight": 1.0},))
        torch.testing.assert_close(self.merged(one), case.tensors[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_a_source_that_only_repeats_adds_nothing(self, alpha: float) -> None:
        case = self.random_case((8, 10), seed=71)
        twice = self.case(
            [case.tensors[0], case.tensors[0]],
            weights(1.0, 0.5),
            base=case.base,
            alpha=alpha,
            **scaled(4 / 3),
        )
        torch.testing.assert_close(self.merged(twice), case.tensors[0], rtol=1e-5, atol=1e-5)

    def test_model_of_several_tensors_is_as_far_from_the_base_as_its_sources_on_average(self) -> None:
        norm_place = replace(PLACE, role="norm", name="model.norm.weight")
        cases = [
            self.random_case((8, 10), seed=72),
            replace(self.random_case((30,), seed=73), place=norm_place),
            self.random_case((3, 4, 4), seed=74),
        ]
        cases = [replace(case, sources=tuple(weights(1.0, 1.0, 1.0))) for case in cases]
        results = Tensors(cases).merged()
        moved = np.concatenate([flat(r) - flat(c.base) for r, c in zip(results, cases, strict=True)])  # type: ignore[arg-type]
        lengths = [np.linalg.norm(np.concatenate([case.deltas[i] for case in cases])) for i in range(3)]
        assert np.linalg.norm(moved) == pytest.approx(np.mean(lengths), rel=1e-6)
        alone = self.merged(cases[0])
        assert not same_bits(results[0], alone), "the other tensors count"

    def test_scale_is_the_same_for_prepared_state_made_again(self) -> None:
        case = self.random_case((8, 10), seed=75)
        inputs = Sources(case.base, case.tensors, case.keys, case.place, case.layers)
        kernel, values = KERNELS[self.name], Values(case.method, case.sources, 0)
        scales = [kernel.whole([Single(values, inputs, kernel.prepare(inputs, values))]) for _ in range(2)]
        assert scales[0] == scales[1] > 0
