"""Consensus, SCE, VaRM, nearswap and Arcee Fusion: the contract, worked examples, results of mergekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.catalogue import CATALOGUE
from evomerge.errors import CandidateError, RecipeError
from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.recipe import Scalar
from evomerge.records import Place
from tests.contracts.method import (
    DTYPES,
    SHAPES,
    Array,
    Case,
    DeltaContract,
    Expected,
    MethodContract,
    Single,
    flat,
    same_bits,
    scaled,
)
from tests.merging.fixture import BASE, TAU

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]
THETA = tuple(BASE + tau for tau in TAU)

# Inputs of the reference outputs below, which are those of mergekit 0.1.5 (torch 2.13 on a CPU, float32):
# `method([TensorGroup.from_tensors([base, *sources], base_index=0)], parameters={...})[0]`.
MK_BASE = [[-0.15, 0.79, 0.95, -1.11], [1.69, -0.89, -0.36, 1.23], [0.14, -1.68, 0.32, 0.13]]
MK_SOURCES = (
    [[-0.08, 0.91, 1.64, -0.44], [2.91, -0.79, 0.87, 2.25], [1.03, -2.14, 0.09, -0.23]],
    [[0.49, 0.29, 1.85, -1.42], [2.5, 0.07, -0.57, 1.19], [-0.35, -2.31, 0.22, 0.27]],
    [[-0.08, 0.95, 0.91, -1.58], [0.74, -0.39, -0.7, 1.69], [0.19, -1.38, 0.48, -0.31]],
)


class Weightless(DeltaContract):
    """Methods on deltas whose sources have no weights, so that none can be selected by them."""

    def test_weights_zero_give_the_base(self) -> None:
        """There are none; sources whose deltas are zero are tested in their place."""
        assert "weight" not in {parameter.name for parameter in CATALOGUE[self.name].parameters}
        case = self.random_case((11, 13), seed=14)
        assert case.base is not None
        assert same_bits(self.merged(replace(case, tensors=(case.base,) * len(case.tensors))), case.base)


class TestConsensus(Weightless):
    """Task arithmetic on the entries that several sources count on."""

    name = "consensus"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        base, deltas, scale = flat(case.base), np.stack(case.deltas), case.number("lambda")
        limits = np.array(case.numbers("tall_lambda"))[:, None]
        whole = deltas.sum(0)
        others = limits * np.abs(whole - deltas)
        kept = (np.abs(deltas) > others).sum(0) >= case.number("agreement")
        sizes = np.abs(base) + np.abs(deltas).sum(0)
        close = (np.abs(np.abs(deltas) - others) < 1e-6 * (1 + limits) * sizes).any(0)
        return Expected(
            base + scale * kept * whole,
            np.abs(base) + abs(scale) * len(deltas) * sizes,
            close & (not case.exact),
        )

    def averaging(self, count: int) -> Parameters:
        return {"agreement": 0.0, **scaled(1 / count)}, [{} for _ in range(count)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """Sources are always added up, so only one whose companions are the base is given as it is."""
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        assert case.base is not None
        tensors = [case.base] * 3
        tensors[index] = case.tensors[index]
        parameters = self.parameters({"agreement": 1.0}, [{}] * 3)
        result = self.merged(replace(case, tensors=tuple(tensors), **parameters))
        torch.testing.assert_close(result, case.tensors[index], rtol=1e-6, atol=1e-6)

    def test_worked_example(self) -> None:
        case = self.case(THETA, [{"tall_lambda": 0.4}] * 3, base=BASE, agreement=2.0, **scaled(0.3))
        np.testing.assert_allclose(flat(self.merged(case)), [1, 1, 1, 1, 2.5, -0.05], atol=1e-6)

    def test_worked_example_counts_who_counts_on_each_entry(self) -> None:
        whole = np.sum(TAU, axis=0)
        counts = np.zeros(6)
        for agreement in (1.0, 2.0, 3.0):
            case = self.case(THETA, base=BASE, agreement=agreement)
            counts += (flat(self.merged(case)) - BASE != 0) & (whole != 0)
        assert counts[whole != 0].tolist() == [1, 1, 3, 2]

    def test_agreement_of_nobody_is_task_arithmetic_and_of_more_than_there_are_the_base(self) -> None:
        case = self.random_case((9, 5), seed=20)
        assert case.base is not None
        everything = replace(case, method={**case.method, "agreement": 0.0, **scaled(0.25)})
        sums = case.base.double() + 0.25 * sum(tensor.double() - case.base for tensor in case.tensors)
        torch.testing.assert_close(self.merged(everything).double(), sums, rtol=1e-6, atol=1e-6)
        nothing = replace(case, method={**case.method, "agreement": 3.5})
        assert same_bits(self.merged(nothing), case.base)

    def test_entry_that_a_source_has_not_changed_is_never_its_own(self) -> None:
        case = self.case([[0.0], [0.0]], [{"tall_lambda": 0.0}] * 2, base=[0.0], agreement=1.0)
        kernel_sees = replace(case, tensors=(torch.tensor([3.0]), torch.tensor([0.0])))
        assert self.merged(kernel_sees).tolist() == [3.0]
        both = replace(kernel_sees, method={**case.method, "agreement": 2.0})
        assert self.merged(both).tolist() == [0.0]

    def test_each_source_has_a_limit_of_its_own(self) -> None:
        limits: list[Mapping[str, Scalar]] = [{"tall_lambda": 10.0}, {"tall_lambda": 0.1}]
        case = self.case([[4.0, 1.0], [1.0, 4.0]], limits, base=[0.0, 0.0], agreement=1.0)
        assert self.merged(case).tolist() == [5.0, 5.0]
        assert self.merged(replace(case, method={**case.method, "agreement": 2.0})).tolist() == [0.0, 0.0]


class TestSce(Weightless):
    """Select, calculate, erase."""

    name = "sce"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        base, deltas, scale = flat(case.base), np.stack(case.deltas), case.number("lambda")
        steps = np.stack([flat(tensor) - flat(case.tensors[0]) for tensor in case.tensors])
        spread = len(steps) * (steps**2).sum(0) - steps.sum(0) ** 2
        mask, unclear = np.ones(base.shape, dtype=bool), np.zeros(base.shape, dtype=bool)
        if case.number("select_topk") < 1:
            order = sorted(range(spread.size), key=lambda i: (-spread[i], i))
            count = int(case.number("select_topk") * np.count_nonzero(spread))
            mask[order[count:]] = False
            if 0 < count < spread.size and not case.exact:
                last, first = spread[order[count - 1]], spread[order[count]]
                unclear |= last - first < 1e-4 * last
        masked = np.where(mask, deltas, 0.0)
        energies = (masked**2).sum(1) / max(1, base.size)
        least = 1e-6 if case.method["variant"] == "mergekit" else 0.0
        if energies.sum() == 0 or energies.sum() < least:
            weights = np.full(len(deltas), 1 / len(deltas))
        else:
            weights = energies / energies.sum()
        unclear |= bool(abs(energies.sum() - least) < 1e-9) and energies.sum() > 0
        pieces = masked if case.method["variant"] == "mergekit" else deltas
        sign = np.where(pieces.sum(0) >= 0, 1.0, -1.0)
        sizes = np.abs(base) + np.abs(pieces).sum(0)
        if not case.exact:
            unclear |= (np.abs(pieces.sum(0)) < 1e-5 * sizes) & (np.abs(pieces).max(0) > 0)
        agrees = (np.sign(pieces) == sign) * weights[:, None]
        divisor = agrees.sum(0)
        divisor = np.maximum(divisor, 1e-6) if least else np.where(divisor == 0, 1.0, divisor)
        value = (agrees * pieces).sum(0) / divisor
        return Expected(base + scale * value, np.abs(base) + 2 * abs(scale) * sizes, unclear)

    def sensible(self, case: Case) -> Case:
        """Exact in what decides: the energies' shares divide by any number."""
        return case

    def averaging(self, count: int) -> Parameters:
        return {}, [{} for _ in range(count)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """Weights come from the deltas: one whose companions are the base is given as it is."""
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        assert case.base is not None
        tensors = [case.base] * 3
        tensors[index] = case.tensors[index]
        result = self.merged(replace(case, tensors=tuple(tensors)))
        torch.testing.assert_close(result, case.tensors[index], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("variant", "merged"),
        [
            ("mergekit", (0, 3, 0, 0, 4.70769231, -3.29508197)),
            ("fusechat", (2.22144522, 3, 1.14615385, -3, 4.70769231, -3.29508197)),
        ],
    )
    def test_worked_example(self, variant: str, merged: Sequence[float]) -> None:
        case = self.case(THETA, base=BASE, select_topk=0.5, variant=variant)
        np.testing.assert_allclose(flat(self.merged(case)) - BASE, merged, rtol=1e-6, atol=1e-6)

    MERGEKIT: ClassVar = {
        1.0: (
            *(0.101898, 0.29, 1.720664, -1.475441, 2.752513, -0.447875),
            *(0.87, 2.110834, 0.821251, -2.205299, 0.139935, -0.249881),
        ),
        0.5: (
            *(-0.15, 0.79, 0.95, -1.502907, 2.825097, -0.89),
            *(0.87, 2.127208, 0.845812, -2.175204, 0.32, 0.13),
        ),
        0.2: (-0.15, 0.79, 0.95, -1.11, 2.832442, -0.89, 0.87, 1.23, 0.14, -1.68, 0.32, 0.13),
    }

    @pytest.mark.parametrize("topk", MERGEKIT)
    def test_result_is_that_of_mergekit(self, topk: float) -> None:
        case = self.case(MK_SOURCES, base=MK_BASE, select_topk=topk)
        np.testing.assert_allclose(flat(self.merged(case)), self.MERGEKIT[topk], rtol=0, atol=2e-6)

    def test_small_deltas_weigh_the_same_in_mergekit_and_by_energy_in_fusechat(self) -> None:
        base = torch.tensor(MK_BASE, dtype=torch.float64)
        near = [base + (torch.tensor(source).double() - base) * 1e-3 for source in MK_SOURCES]
        case = self.case(near, base=base, select_topk=0.5)
        merged = (flat(self.merged(case)) - flat(case.base)) * 1e3  # mergekit 0.1.5 as above
        theirs = [0, 0, 0, -0.389934, 1.014948, 0, 1.230001, 0.740051, 0.469998, -0.545025, 0, 0]
        np.testing.assert_allclose(merged, theirs, rtol=0, atol=2e-4)
        fuse = replace(case, method={**case.method, "variant": "fusechat"})
        merged = (flat(self.merged(fuse)) - flat(case.base)) * 1e3
        large = self.case(MK_SOURCES, base=MK_BASE, select_topk=0.5, variant="fusechat")
        np.testing.assert_allclose(merged, flat(self.merged(large)) - flat(large.base), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("topk", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
    def test_counts_are_exact_among_equal_variances_and_the_earlier_entries_are_first(
        self, topk: float
    ) -> None:
        steps = np.resize([0.0, 1.0, 1.0, 2.0], 10_007)
        case = self.case([steps, np.zeros(10_007)], base=np.zeros(10_007), select_topk=topk)
        kept = np.flatnonzero(flat(self.merged(case)))
        order = np.argsort(-steps, kind="stable")[: int(topk * np.count_nonzero(steps))]
        assert kept.tolist() == sorted(order)

    def test_sources_that_agree_everywhere_have_no_variance_to_select(self) -> None:
        third = torch.full((5,), 1 / 3)
        case = self.case([third] * 3, base=torch.zeros(5), select_topk=0.99)
        assert self.merged(case).tolist() == [0.0] * 5
        assert same_bits(self.merged(replace(case, method={**case.method, "select_topk": 1.0})), third)


def kept_or_not(case: Case, result: torch.Tensor) -> torch.Tensor:
    """Return which entries are the source's; the others must be the base's."""
    assert case.base is not None
    taken = (result.double() - case.tensors[0].double()).abs() <= 1e-6
    assert bool((taken | (result == case.base)).all())
    return taken


class TestArceeFusion(Weightless):
    """What changed most and matters."""

    name = "arcee_fusion"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        base, source = flat(case.base), flat(case.tensors[0])
        columns = case.base.shape[-1] if case.base.ndim else 1
        new, old = (np.exp(each.reshape(-1, columns)) for each in (source, base))
        new, old = (rows / rows.sum(1, keepdims=True) + 1e-8 for rows in (new, old))
        divergence = np.maximum((new * np.log(new / old)).sum(1, keepdims=True), 0.0)
        importance = (np.abs(source - base).reshape(-1, columns) * divergence).reshape(-1)
        importance[importance < 1e-14] = 0.0
        ordered = np.sort(importance)
        low, median, high = (ordered[int(q * (base.size - 1))] for q in (0.25, 0.5, 0.75))
        limit = median + 1.5 * (high - low)
        unclear = (np.abs(importance - limit) < 1e-5 * limit) & (limit > 0)
        scale = case.number("lambda")
        value = base + scale * np.where(importance >= limit, source - base, 0.0)
        return Expected(value, np.abs(base) + abs(scale) * (np.abs(base) + np.abs(source)), unclear)

    def sensible(self, case: Case) -> Case:
        """Exponentials are not exact."""
        return replace(case, exact=False)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_identical_sources_give_the_source(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """There is one source, and of it only what stands out."""
        case = self.random_case(shape, dtype=dtype, seed=1)
        assert kept_or_not(case, self.merged(case, torch.float32)).shape == shape

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """No parameter decides what is kept; of many entries some are and some are not."""
        case = self.random_case((70_001,), dtype=dtype, seed=2 + index)
        taken = kept_or_not(case, self.merged(case, torch.float32))
        assert 0 < int(taken.sum()) < taken.numel() / 2

    def test_result_is_that_of_mergekit(self) -> None:
        case = self.case(MK_SOURCES[:1], base=MK_BASE)
        theirs = (-0.15, 0.79, 0.95, -1.11, 1.69, -0.89, -0.36, 1.23, 1.03, -2.14, 0.32, 0.13)
        np.testing.assert_allclose(flat(self.merged(case)), theirs, rtol=0, atol=2e-7)
        long = self.case([np.ravel(MK_SOURCES[0])], base=np.ravel(MK_BASE))
        np.testing.assert_allclose(flat(self.merged(long)), np.ravel(MK_BASE), rtol=0, atol=2e-7)

    def test_small_deltas_are_told_apart_where_float32_could_not(self) -> None:
        """Divergences of some 5e-7 of probabilities near 1/384; mergekit in float64 keeps the same."""
        case = self.random_case((257, 384), seed=22)
        assert case.base is not None
        near = replace(case, tensors=(case.base + 3e-3 * (case.tensors[0] - case.base),))
        expected = self.expected(near)
        agrees = np.abs(flat(self.merged(near)) - expected.value) <= 2e-7 * expected.size
        assert (agrees | expected.unclear).all()
        assert 0.01 < (expected.value != flat(case.base)).mean() < 0.2

    def test_row_that_changed_by_a_constant_has_no_importance(self) -> None:
        base = torch.zeros(4, 2)
        source = base.clone()
        source[0] += 5.0
        source[1, 0] = 1.0
        case = self.case([source], base=base)
        assert KERNELS[self.name].prepare(case.inputs, Values({}, (), 0)).tolist() == [True] * 8
        source[2:, 0] = torch.tensor([0.01, 0.02])
        mask = KERNELS[self.name].prepare(self.case([source], base=base).inputs, Values({}, (), 0))
        assert mask.tolist() == [False, False, True, False, False, False, True, False]


class TestNearswap(MethodContract):
    """The second source where it is near."""

    name = "nearswap"

    def expected(self, case: Case) -> Expected:
        first, second = (flat(tensor) for tensor in case.tensors)
        t = case.number("t")
        gap = np.abs(second - first)
        weight = np.minimum(1.0, np.divide(t, gap, out=np.ones_like(gap), where=gap > 0))
        value = weight * second + (1 - weight) * first
        return Expected(value, np.abs(first) + np.abs(second) + t, np.zeros(gap.shape, dtype=bool))

    def selecting(self, index: int, count: int) -> Parameters:
        return {"t": 1e9 * index}, [{}, {}]

    def averaging(self, count: int) -> Parameters:
        return {"t": 0.1}, [{}, {}]

    @pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
    def test_order_of_the_sources_changes_nothing_beyond_rounding(self, order: tuple[int, ...]) -> None:
        """It says which one is moved: what one moves up, the other moves down."""
        case = self.random_case((40, 50), seed=3 + order[0])
        there, back = self.merged(case), self.merged(replace(case, tensors=case.tensors[::-1]))
        torch.testing.assert_close(there + back, case.tensors[0] + case.tensors[1], rtol=1e-5, atol=1e-6)
        assert not torch.equal(there, back)

    def test_result_is_that_of_mergekit(self) -> None:
        case = self.case([MK_BASE, MK_SOURCES[0]], t=0.3)
        theirs = (-0.08, 0.91, 1.25, -0.81, 1.99, -0.79, -0.06, 1.53, 0.44, -1.98, 0.09, -0.17)
        np.testing.assert_allclose(flat(self.merged(case)), theirs, rtol=0, atol=2e-7)

    def test_entries_within_t_are_the_second_sources_bit_for_bit(self) -> None:
        case = self.random_case((1_000,), seed=21, t=0.05)
        result, (first, second) = self.merged(case), case.tensors
        near = (second - first).abs() <= 0.05
        assert 0 < int(near.sum()) < 1_000
        assert torch.equal(result[near], second[near])
        torch.testing.assert_close((result - first).abs()[~near], torch.full((int((~near).sum()),), 0.05))


def variation(deltas: Array, statistic: str) -> list[float]:
    kinds = {"square": deltas**2, "abs": np.abs(deltas), "mean": deltas}
    return [float(row) for row in kinds[statistic].mean(1)]


class TestVarm(MethodContract):
    """Averages weighted by variation."""

    name = "varm"

    def expected(self, case: Case) -> Expected:
        statistics = np.array(variation(np.stack(case.deltas), str(case.method["statistic"])))
        temperature = case.number("temperature")
        if not statistics.any():
            weights = np.full(len(statistics), 1 / len(statistics))
        else:
            raised = np.exp((statistics - statistics.max()) / temperature) if temperature else statistics
            weights = raised / raised.sum()
        terms = weights[:, None] * np.stack([flat(tensor) for tensor in case.tensors])
        return Expected(terms.sum(0), np.abs(terms).sum(0), np.zeros(terms.shape[1], dtype=bool))

    def sensible(self, case: Case) -> Case:
        """Sharper temperatures amplify rounding, means can cancel out."""
        method = dict(case.method)
        if case.number("temperature") < 1e-3:
            method["temperature"] = 0.0
        means = variation(np.stack(case.deltas), "mean")
        if abs(sum(means)) < 0.1 * sum(map(abs, means)) and method["statistic"] == "mean":
            method["statistic"] = "abs"
        return replace(case, method=method)

    def averaging(self, count: int) -> Parameters:
        return {}, [{} for _ in range(count)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """Weights come from the deltas: the only source that moved has all the weight."""
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        assert case.base is not None
        tensors = [case.base] * 3
        tensors[index] = case.tensors[index]
        assert same_bits(self.merged(replace(case, tensors=tuple(tensors))), case.tensors[index])

    def test_sources_that_have_not_moved_share_the_weight(self) -> None:
        case = self.case([BASE, BASE], base=BASE, temperature=0.0)
        assert flat(self.merged(case)).tolist() == BASE.tolist()

    def test_worked_example(self) -> None:
        case = self.case(THETA, base=BASE)
        merged = (3.35966387, 0.62184874, 1.30336134, 0.11092437, 3.38655462, -0.14957983)
        np.testing.assert_allclose(flat(self.merged(case)), merged, rtol=1e-6, atol=1e-6)

    def test_temperature_runs_from_the_winner_alone_to_equal_weights(self) -> None:
        case = self.case(THETA, base=BASE)
        for temperature, expected in ((1e-3, THETA[2]), (1e9, np.mean(THETA, axis=0))):
            method = {**case.method, "temperature": temperature}
            np.testing.assert_allclose(flat(self.merged(replace(case, method=method))), expected, atol=1e-5)

    def test_means_that_cancel_out_have_no_merge(self) -> None:
        case = self.case([[1.0, 1.0], [-1.0, -1.0]], base=[0.0, 0.0], statistic="mean")
        with pytest.raises(CandidateError, match="sum to"):
            self.merged(case)

    def model(self, granularity: str, names: Sequence[str] = ("a", "b")) -> dict[str, list[float]]:
        """Return the weights of two sources, by tensor, in a model of five tensors."""
        parameters = self.parameters({"granularity": granularity}, [{}, {}])
        values = Values(parameters["method"], parameters["sources"], 0)
        places = [
            Place("embed", "embedding", None, 0.0),
            Place("0.q", "attention", 0, 0.0),
            Place("0.up", "mlp", 0, 0.0),
            Place("0.down", "mlp", 0, 0.0),
            Place("1.up", "mlp", 1, 1.0),
        ]
        views: list[Any] = []
        for i, place in enumerate(places):
            first = torch.full((i + 1,), 1.0 + i)
            keys = tuple(f"{name}\x1f{place.name}" for name in names)
            inputs = Sources(torch.zeros(i + 1), (first, torch.ones(i + 1)), keys, place, 2)
            views.append(Single(values, inputs, KERNELS["varm"].prepare(inputs, values)))
        whole = KERNELS["varm"].whole(views)
        found = {}
        for view in views:
            out, inputs = torch.empty_like(view.tensors.tensors[0]), view.tensors
            KERNELS["varm"].merge(inputs, view.state, replace(values, whole=whole), out)
            found[inputs.place.name] = float(out[0])
        return {name: [float(value)] for name, value in found.items()}

    @pytest.mark.parametrize(
        ("granularity", "squares"),
        [
            # mean square of the first source; that of the second is 1 everywhere
            ("tensor", {"embed": 1, "0.q": 4, "0.up": 9, "0.down": 16, "1.up": 25}),
            (
                "layer",
                {"embed": 1, "0.q": 99 / 9, "0.up": 99 / 9, "0.down": 99 / 9, "1.up": 25},
            ),
            ("role", {"embed": 1, "0.q": 4, "0.up": 91 / 7, "0.down": 91 / 7, "1.up": 25}),
            ("model", dict.fromkeys(("embed", "0.q", "0.up", "0.down", "1.up"), 225 / 15)),
        ],
    )
    def test_what_belongs_together_shares_its_weights(
        self, granularity: str, squares: dict[str, float]
    ) -> None:
        merged = self.model(granularity)
        for i, (name, square) in enumerate(squares.items()):
            share = square / (square + 1)
            assert merged[name][0] == pytest.approx(share * (1 + i) + 1 - share, rel=1e-6)

    def test_tensors_with_different_sources_cannot_share_weights(self) -> None:
        case = self.random_case((3,), count=2)
        values = Values(case.method, case.sources, 0)
        views: list[Any] = []
        for key, layer in (("a", 0), ("b", 1)):
            place = Place(f"{layer}.up", "mlp", layer, float(layer))
            inputs = Sources(case.base, case.tensors, (f"{key}\x1fx", "c\x1fx"), place, 2)
            views.append(Single(values, inputs, KERNELS["varm"].prepare(inputs, values)))
        assert len(KERNELS["varm"].whole(views)) == 2
        for view in views:
            view.values = replace(values, method={**case.method, "granularity": "model"})
        with pytest.raises(RecipeError, match=r"0\.up and 1\.up are judged together"):
            KERNELS["varm"].whole(views)
