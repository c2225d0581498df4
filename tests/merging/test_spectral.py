"""TSV-Merge, Iso-C and Iso-CTS: the contract, their worked examples, and what they do to spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.merging.methods import KERNELS, Values
from evomerge.merging.methods.spectral import common_rank
from tests.contracts.method import Array, Case, flat, same_bits, scaled
from tests.merging.spectra import SpectralContract, doubtful, polar, rotation, singular, weights

PAIR = ([[4.0, 0], [0, 1]], [[0, 0], [1.8, 2.4]])
"""Two 2 x 2 deltas whose leading singular vectors are not orthogonal."""

ZERO = np.zeros((2, 2))


def spectrum(case: Case, result: torch.Tensor) -> Array:
    assert case.base is not None
    return np.linalg.svd((result.double() - case.base.double()).numpy(), compute_uv=False)


class TestTSVMerge(SpectralContract):
    """Decorrelated singular vectors."""

    name = "tsv_m"

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        side, count = min(deltas[0].shape), len(deltas)
        factors = case.numbers("weight")
        if side < count:
            return sum(w * d for w, d in zip(factors, deltas, strict=True)) / count, False
        rank = max(1, int(case.number("rank") * side / count))
        parts = [[part[:, :rank], values[:rank], rows[:rank]] for part, values, rows in map(singular, deltas)]
        left, right = np.hstack([part[0] for part in parts]), np.vstack([part[2] for part in parts])
        values = np.concatenate([w * part[1] for w, part in zip(factors, parts, strict=True)])
        if not values.size:
            return np.zeros_like(deltas[0]), False
        doubt = any(doubtful(d, rank) for d in deltas) or any(doubtful(s, 10**9) for s in (left, right))
        return polar(left) * values @ polar(right), doubt

    def test_worked_example(self) -> None:
        case = self.case(PAIR, base=ZERO)
        state = KERNELS[self.name].prepare(case.inputs, Values(case.method, case.sources, 0))[0]
        expected = [[3.79473319, -1.26491106], [0.9486833, 2.84604989]]
        np.testing.assert_allclose(flat(self.merged(case)).reshape(2, 2), expected, atol=1e-6)
        right = [[0.9486833, -0.31622777], [0.31622777, 0.9486833]]
        np.testing.assert_allclose(np.abs(state.right.numpy()), np.abs(right), atol=1e-6)

    def test_one_source_is_given_back_at_full_rank(self) -> None:
        case = self.random_case((9, 14), count=1, seed=50, **scaled(1.0))
        one = Case(case.base, case.tensors, case.method, ({"weight": 1.0},))
        torch.testing.assert_close(self.merged(one), case.tensors[0], rtol=1e-6, atol=1e-6)

    def test_sources_in_orthogonal_subspaces_are_added(self) -> None:
        left, right = rotation(6, 2), rotation(6, 3)
        parts = [left[:, i : i + 2] * [2.0, 1.0] @ right[i : i + 2] for i in (0, 2, 4)]
        case = self.case(parts, base=np.zeros((6, 6)))
        np.testing.assert_allclose(flat(self.merged(case)), sum(parts).reshape(-1), atol=1e-6)

    def test_result_is_linear_in_the_weights(self) -> None:
        deltas = np.random.default_rng(51).normal(size=(3, 6, 7))
        single = [
            flat(self.merged(self.case(deltas, weights(*unit), base=np.zeros((6, 7))))) for unit in np.eye(3)
        ]
        mixed = self.case(deltas, weights(0.5, -1.0, 2.0), base=np.zeros((6, 7)))
        expected = 0.5 * single[0] - single[1] + 2.0 * single[2]
        np.testing.assert_allclose(flat(self.merged(mixed)), expected, atol=3e-6)

    def test_identical_matrices_give_their_leading_directions(self) -> None:
        delta = np.random.default_rng(52).normal(size=(6, 8))
        left, values, right = singular(delta)
        case = self.case([delta, delta], base=np.zeros((6, 8)))
        leading = left[:, :3] * values[:3] @ right[:3]
        np.testing.assert_allclose(flat(self.merged(case)), leading.reshape(-1), atol=1e-6)

    def test_rank_is_the_share_of_each_source(self) -> None:
        case = self.random_case((12, 20), seed=53, rank=0.5)
        assert np.linalg.matrix_rank(np.diag(spectrum(case, self.merged(case))), tol=1e-4) == 3 * 2

    def test_matrix_with_fewer_rows_than_sources_gets_the_mean(self) -> None:
        case = self.random_case((2, 9), seed=54)
        self.assert_merged_as_a_vector(case)

    def test_transposed_matrices_give_the_transposed_result(self) -> None:
        deltas = np.random.default_rng(55).normal(size=(2, 6, 9))
        plain = self.merged(self.case(deltas, base=np.zeros((6, 9))))
        turned = self.merged(self.case([d.T.copy() for d in deltas], base=np.zeros((9, 6))))
        torch.testing.assert_close(turned, plain.T, rtol=0, atol=1e-5)


class TestIsoC(SpectralContract):
    """One singular value for all directions of the sum."""

    name = "iso_c"

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        merged = np.sum([w * d for w, d in zip(case.numbers("weight"), deltas, strict=True)], axis=0)
        length = max(np.linalg.norm(w * d) for w, d in zip(case.numbers("weight"), deltas, strict=True))
        left, values, right = singular(merged)
        if not values.size:
            return merged, False
        return values.mean() * left @ right, doubtful(merged, 10**9) or values[0] < 1e-6 * length

    @pytest.mark.parametrize(
        ("deltas", "merged"),
        [([[[0.0, 3], [1, 0]]], [[0, 2], [2, 0]]), (PAIR, [[3.7, -0.9], [0.9, 3.7]])],
    )
    def test_worked_example(self, deltas: list[list[list[float]]], merged: list[list[float]]) -> None:
        result = self.merged(self.case(deltas, base=ZERO))
        np.testing.assert_allclose(result.numpy(), merged, atol=1e-6)

    def test_all_singular_values_are_the_mean_of_those_of_the_sum(self) -> None:
        deltas = np.random.default_rng(56).normal(size=(3, 8, 6))
        case = self.case(deltas, base=np.zeros((8, 6)))
        expected = np.linalg.svd(deltas.sum(0), compute_uv=False).mean()
        np.testing.assert_allclose(spectrum(case, self.merged(case)), np.full(6, expected), rtol=1e-6)

    def test_null_directions_of_the_sum_stay_without_a_change(self) -> None:
        generator = np.random.default_rng(57)
        delta = generator.normal(size=(8, 2)) @ generator.normal(size=(2, 6))
        case = self.case([delta], base=np.zeros((8, 6)))
        mean = singular(delta)[1].mean()
        np.testing.assert_allclose(
            spectrum(case, self.merged(case)), [mean, mean, 0, 0, 0, 0], rtol=1e-5, atol=1e-5
        )


class TestIsoCTS(SpectralContract):
    """Common and task-specific directions."""

    name = "iso_cts"

    def expected_matrix(self, deltas: list[Array], case: Case) -> tuple[Array, bool]:
        own = [w * d for w, d in zip(case.numbers("weight"), deltas, strict=True)]
        side, count, merged = min(own[0].shape), len(own), np.sum(own, axis=0)
        each = min(round((side - int(side * case.number("common"))) / count), side // count)
        cut = side - each * count
        found = singular(merged)
        left, values, right = found[0][:, :cut], found[1][:cut], found[2][:cut]
        parts, doubt = [(left, values, right)], doubtful(merged, cut)
        for delta in own:
            rest, size = delta - left @ left.T @ delta, float(np.linalg.norm(delta))
            u, s, v = singular(rest, size)
            parts.append((u[:, :each], s[:each], v[:each]))
            doubt |= doubtful(rest, each, size)
        collected = np.concatenate([part[1] for part in parts])
        if not collected.size:
            return np.zeros_like(merged), doubt
        stacks = np.hstack([part[0] for part in parts]), np.vstack([part[2] for part in parts])
        doubt |= any(doubtful(stack, 10**9) for stack in stacks)
        return collected.mean() * polar(stacks[0]) @ polar(stacks[1]), doubt

    def test_without_room_for_single_sources_it_is_iso_c(self) -> None:
        case = self.random_case((6, 9), seed=58, common=1.0)
        isotropic = TestIsoC().random_case((6, 9), seed=58)
        torch.testing.assert_close(self.merged(case), TestIsoC().merged(isotropic), rtol=1e-6, atol=1e-6)

    def test_directions_of_one_source_outside_the_common_ones_are_kept(self) -> None:
        strong, weak = np.diag([8.0, 4, 0, 0]), np.diag([0, 0, 2.0, 0])
        case = self.case([strong, weak], base=np.zeros((4, 4)), common=0.5)
        mean = (8 + 4 + 2) / 3
        np.testing.assert_allclose(self.merged(case).numpy(), np.diag([mean, mean, mean, 0]), atol=1e-6)

    def test_source_within_the_common_directions_adds_none_of_its_own(self) -> None:
        common = rotation(4, 4)[:, :2]
        sources = [common @ part for part in np.random.default_rng(61).normal(size=(2, 2, 4))]
        case = self.case(sources, base=np.zeros((4, 4)), common=0.5)
        mean = singular(sources[0] + sources[1])[1][:2].mean()
        np.testing.assert_allclose(
            spectrum(case, self.merged(case)), [mean, mean, 0, 0], rtol=1e-5, atol=1e-5
        )

    def test_all_kept_directions_have_one_singular_value(self) -> None:
        case = self.random_case((12, 15), seed=59, common=0.5)
        found = spectrum(case, self.merged(case))
        np.testing.assert_allclose(found, np.full(12, found[0]), rtol=1e-5)

    @pytest.mark.parametrize(
        ("share", "side", "count", "common", "each"),
        [(0.8, 10, 2, 8, 1), (0.8, 10, 3, 7, 1), (0.2, 3, 2, 1, 1), (0.0, 12, 4, 0, 3), (1.0, 5, 3, 5, 0)],
    )
    def test_common_directions_leave_a_number_that_the_sources_can_share(
        self, share: float, side: int, count: int, common: int, each: int
    ) -> None:
        assert common_rank(share, side, count) == (common, each)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_candidates_at_new_weights_are_what_they_are_without_prepared_state(name: str) -> None:
    contract = {"tsv_m": TestTSVMerge, "iso_c": TestIsoC, "iso_cts": TestIsoCTS}[name]()
    first = contract.random_case((9, 11), seed=60)
    state = contract.prepared(first)
    second = Case(first.base, first.tensors, first.method, tuple(weights(1.5, 0.0, -0.5)))
    assert same_bits(contract.merged(second, prepared=state), contract.merged(second))
