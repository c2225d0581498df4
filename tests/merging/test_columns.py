"""WIDEN: the contract, and the worked example of its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from evomerge.catalogue import CATALOGUE
from evomerge.merging.methods import KERNELS, Values
from evomerge.records import Place
from evomerge.rules import Scalar
from tests.contracts.method import DTYPES, Array, Case, DeltaContract, Expected, flat, same_bits, scaled

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
W0 = np.array([[3.0, 0, 1], [4, 2, 1]])
TAUS = (np.array([[0.0, 1, 0], [1, 0, 0]]), np.array([[1.0, 0, 1], [0, 0, -1]]))
EMBEDDING = Place("model.embed_tokens.weight", "embedding", None, 0.0)


def ranked(changes: Array) -> npt.NDArray[np.int64]:
    ranks = np.empty(changes.shape, dtype=np.int64)
    ranks[np.argsort(changes, kind="stable")] = np.arange(changes.size)
    return ranks


def near_others(changes: Array) -> npt.NDArray[np.bool_]:
    """Return which changes are so near to another that rounding decides between them; zeros are equal."""
    order = np.argsort(changes)
    gaps = np.diff(changes[order], prepend=-np.inf, append=np.inf)
    near = np.empty(changes.size, dtype=bool)
    near[order] = np.minimum(gaps[:-1], gaps[1:]) < 1e-12
    least = changes[changes != 0].min(initial=np.inf)  # changes are never negative
    return np.where(changes == 0, least < 1e-12, near)


def scores_of(significance: Array, average: Array, case: Case) -> Array:
    raised = np.exp(significance)
    important = significance > case.number("above_average_value_ratio") * average
    return np.where(important, case.number("score_calibration_value"), raised / raised.sum(0))


def judged(sources: Sequence[Array], base: Array, case: Case) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return scores of the columns of one matrix (sources x columns), and which of them are unclear."""
    lengths, turns = [], []
    old = (base**2).sum(0)
    for matrix in sources:
        new = (matrix**2).sum(0)
        lengths.append(np.abs(np.sqrt(new) - np.sqrt(old)))
        zero = (new == 0) | (old == 0)
        cosine = (matrix * base).sum(0) / np.sqrt(np.where(zero, 1.0, new * old))
        turns.append(np.where(zero, (new != old) * 1.0, np.maximum(1 - cosine, 0.0)))
    unclear = np.zeros(base.shape[1], dtype=bool)
    parts = []
    for changes in (lengths, turns):
        unclear |= np.any([near_others(change) for change in changes], axis=0)
        columns = base.shape[1]
        ranks = np.stack([ranked(change) for change in changes])
        average = np.array((columns - 1) / 2)
        raised = np.exp(ranks / columns)
        important = ranks > case.number("above_average_value_ratio") * average
        parts.append(np.where(important, case.number("score_calibration_value"), raised / raised.sum(0)))
    return (parts[0] + parts[1]) / 2, unclear


class TestWiden(DeltaContract):
    """Columns weighed by their changes."""

    name = "widen"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        shape, scale = case.base.shape, case.number("lambda")
        deltas, base = np.stack(case.deltas), flat(case.base)
        if len(shape) < 2:
            average = np.abs(deltas).mean(1, keepdims=True)
            limit = case.number("above_average_value_ratio") * average
            unclear = (np.abs(np.abs(deltas) - limit) < 1e-6 * (limit + np.abs(base))).any(0)
            unclear &= (deltas != 0).any(0) & (base.size > 1)
            factors = scores_of(np.abs(deltas), average, case)
        else:
            split = [d.reshape(-1, *shape[-2:]) for d in (base, *(flat(t) for t in case.tensors))]
            found = [judged([s[i] for s in split[1:]], split[0][i], case) for i in range(len(split[0]))]
            wide = [
                (np.broadcast_to(scores[:, None], (len(deltas), *shape[-2:])), unclear)
                for scores, unclear in found
            ]
            factors = np.stack([scores for scores, _ in wide], axis=1).reshape(len(deltas), -1)
            unclear = np.stack([np.broadcast_to(u, shape[-2:]) for _, u in wide]).reshape(-1)
        size = np.abs(base) + abs(scale) * (np.abs(factors) * (np.abs(base) + np.abs(deltas))).sum(0)
        return Expected(base + scale * (factors * deltas).sum(0), size, unclear)

    def sensible(self, case: Case) -> Case:
        """Norms are not exact."""
        return replace(case, exact=False)

    def averaging(self, count: int) -> Parameters:
        return {"score_calibration_value": 1 / count}, [{} for _ in range(count)]

    def test_weights_zero_give_the_base(self) -> None:
        """There are none; sources whose deltas are zero are tested in their place."""
        assert "weight" not in {parameter.name for parameter in CATALOGUE[self.name].parameters}
        case = self.random_case((11, 13), seed=14)
        assert case.base is not None
        assert same_bits(self.merged(replace(case, tensors=(case.base,) * len(case.tensors))), case.base)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """Scores come from the deltas: alone, a source is given as it is."""
        for shape in ((70_001,), (100, 701), (2, 9, 8)):
            case = self.random_case(shape, dtype=dtype, seed=2)
            alone = replace(case, tensors=(case.tensors[index],), sources=(case.sources[index],))
            torch.testing.assert_close(self.merged(alone), case.tensors[index], rtol=1e-6, atol=1e-6)

    def test_worked_example(self) -> None:
        case = self.case([W0 + tau for tau in TAUS], base=W0)
        merged = [[3.75, 0.7912851, 1.7912851], [4.75, 2, 0.2087149]]
        np.testing.assert_allclose(self.merged(case).numpy(), merged, rtol=1e-6, atol=1e-6)

    def test_embedding_is_judged_token_by_token(self) -> None:
        case = self.case([(W0 + tau).T.copy() for tau in TAUS], base=W0.T.copy())
        turned = self.merged(replace(case, place=EMBEDDING))
        matrix = self.merged(self.case([W0 + tau for tau in TAUS], base=W0))
        torch.testing.assert_close(turned.T, matrix)
        assert not torch.allclose(self.merged(case), turned)

    @pytest.mark.parametrize("shape", [(700, 90), (90, 700), (3, 20_000), (20_000, 3)], ids=str)
    @pytest.mark.parametrize("place", [None, EMBEDDING], ids=["matrix", "embedding"])
    def test_large_matrix_is_that_of_the_formula(self, shape: tuple[int, int], place: Place | None) -> None:
        case = self.random_case(shape, seed=31)
        if place:
            turned = replace(
                case,
                base=case.base.T.contiguous(),
                tensors=tuple(tensor.T.contiguous() for tensor in case.tensors),
                place=place,
            )
            result = flat(self.merged(turned).T)
        else:
            result = flat(self.merged(case))
        judge = judged([t.double().numpy() for t in case.tensors], case.base.double().numpy(), case)
        deltas = np.stack(case.deltas).reshape(len(case.tensors), *shape)
        expected = flat(case.base) + (judge[0][:, None] * deltas).sum(0).reshape(-1)
        wrong = np.abs(result - expected) > 1e-5
        assert wrong.mean() < 1e-3, "but for columns that changed equally to rounding"

    def test_experts_are_judged_one_by_one(self) -> None:
        case = self.random_case((3, 6, 5), seed=32)
        result = self.merged(case)
        for i in range(3):
            one = replace(case, base=case.base[i], tensors=tuple(tensor[i] for tensor in case.tensors))
            assert same_bits(result[i], self.merged(one))

    def test_columns_of_length_zero_have_no_direction(self) -> None:
        base = torch.zeros(2, 4)
        base[:, 0] = 1.0
        source = torch.zeros(2, 4)
        source[:, 1] = 1.0  # appears; column 0 disappears; columns 2 and 3 stay zero
        case = self.case([source], base=base)
        state = KERNELS[self.name].prepare(case.inputs, Values({}, (), 0))
        assert state.direction.tolist() == [[[2, 3, 0, 1]]]
        assert state.magnitude.tolist() == [[[2, 3, 0, 1]]]
        assert bool(self.merged(case).isfinite().all())

    def test_vector_entries_above_the_mean_get_the_calibration_value(self) -> None:
        case = self.case([[0.0, 4.0], [2.0, 0.0]], base=[0.0, 0.0], score_calibration_value=0.5)
        assert self.merged(case).tolist() == [1.0, 2.0]
        low = self.case([[3.0, 1.0], [1.0, 3.0]], base=[0.0, 0.0], above_average_value_ratio=2.0)
        share = np.exp(3) / (np.exp(3) + np.exp(1))
        np.testing.assert_allclose(flat(self.merged(low)), [3 * share + 1 - share] * 2, rtol=1e-6)

    def test_scores_of_important_columns_do_not_sum_to_one(self) -> None:
        case = self.case([[1.0, 9.0], [1.0, 9.0]], base=[0.0, 0.0], **scaled(2.0))
        assert self.merged(case).tolist() == [2.0, 36.0]
