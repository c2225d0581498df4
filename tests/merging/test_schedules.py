"""BAI, metric powers, EMA, layer swapping, passthrough: the contract, and worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.recipe import Scalar
from evomerge.records import Place
from tests.contracts.method import DTYPES, Case, DeltaContract, Expected, MethodContract, flat, same_bits

Parameters = tuple[dict[str, Scalar], list[dict[str, Scalar]]]


def summed(case: Case, factors: Sequence[float]) -> Expected:
    """Return the sum of the sources times factors, and the base times the last one if there is one more."""
    tensors = case.tensors if len(factors) == len(case.tensors) else (*case.tensors, case.base)
    terms = np.stack([factor * flat(tensor) for factor, tensor in zip(factors, tensors, strict=True)])
    return Expected(terms.sum(0), np.abs(terms).sum(0), np.zeros(terms.shape[1], dtype=bool))


class TestBai(DeltaContract):
    """Two averages in a row."""

    name = "bai"

    def expected(self, case: Case) -> Expected:
        a, b = case.number("a"), case.number("b")
        return summed(case, (a * b, (1 - a) * b, 1 - b))

    def selecting(self, index: int, count: int) -> Parameters:
        return {"a": float(index == 0), "b": 1.0}, [{}, {}]

    def averaging(self, count: int) -> Parameters:
        return {"a": 0.3, "b": 1.0}, [{}, {}]

    def permuted(self, case: Case, order: Sequence[int]) -> Case:
        turned = super().permuted(case, order)
        return replace(turned, method={**case.method, "a": 1 - case.number("a")}) if order[0] else turned

    # b is what lambda is elsewhere, and the sources have no weights.
    test_lambda_zero_gives_the_base = None  # type: ignore[assignment]
    test_weights_zero_give_the_base = None  # type: ignore[assignment]

    def test_b_zero_gives_the_base(self) -> None:
        case = self.random_case((11, 13), seed=13, b=0.0)
        assert case.base is not None
        assert same_bits(self.merged(case), case.base)

    def test_worked_example(self) -> None:
        case = self.case([[2.0, 0], [0.0, 4]], base=[1.0, 1], a=0.5, b=0.8)
        np.testing.assert_allclose(flat(self.merged(case)), [1, 1.8], rtol=1e-6)


class TestMetricPower(MethodContract):
    """Weights by a power of a metric."""

    name = "mwa_power"

    def expected(self, case: Case) -> Expected:
        weights = np.array(case.numbers("metric")) ** case.number("power")
        return summed(case, (weights / weights.sum()).tolist())

    def sensible(self, case: Case) -> Case:
        return replace(case, sources=tuple({"metric": max(m, 0.125)} for m in case.numbers("metric")))

    def selecting(self, index: int, count: int) -> Parameters:
        return {"power": 100.0}, [{"metric": 1.0 if i == index else 1e-9} for i in range(count)]

    def averaging(self, count: int) -> Parameters:
        return {"power": 2.0}, [{"metric": 0.3 + i} for i in range(count)]

    def test_worked_example(self) -> None:
        metrics: list[dict[str, Scalar]] = [{"metric": 1 / 0.5}, {"metric": 1 / 0.4}]
        case = self.case([[1.0, 0], [0.0, 1]], metrics, power=1.0)
        np.testing.assert_allclose(flat(self.merged(case)), [0.44444444, 0.55555556], rtol=1e-6)

    def test_power_zero_weighs_all_alike(self) -> None:
        metrics: list[dict[str, Scalar]] = [{"metric": 5.0}, {"metric": 0.1}]
        case = self.case([[1.0, 0], [0.0, 1]], metrics, power=0.0)
        assert self.merged(case).tolist() == [0.5, 0.5]

    def test_steps_to_a_high_power_do_not_overflow(self) -> None:
        steps: list[dict[str, Scalar]] = [{"metric": 90_000.0}, {"metric": 100_000.0}]
        case = self.case([[1.0, 0], [0.0, 1]], steps, power=100.0)
        share = 1 / (1 + 0.9**100)
        np.testing.assert_allclose(flat(self.merged(case)), [1 - share, share], rtol=1e-6)

    def test_metric_of_zero_is_refused(self) -> None:
        case = self.case([[1.0], [2.0]], [{"metric": 0.0}, {"metric": 1.0}])
        with pytest.raises(CandidateError, match=r"expected numbers above 0, got \[0\.0, 1\.0\]"):
            self.merged(case)


class TestEma(MethodContract):
    """Moving averages."""

    name = "ema"

    def expected(self, case: Case) -> Expected:
        beta, value = case.number("beta"), flat(case.tensors[0])
        size = np.abs(value)
        for tensor in case.tensors[1:]:
            value = beta * value + (1 - beta) * flat(tensor)
            size = beta * size + (1 - beta) * np.abs(flat(tensor))
        return Expected(value, size, np.zeros(value.shape, dtype=bool))

    def averaging(self, count: int) -> Parameters:
        return {"beta": 0.7}, [{}] * count

    # Of its sources beta can select the first and the last, and their order is the run's.
    test_parameters_that_select_one_source_give_it = None  # type: ignore[assignment]
    test_order_of_the_sources_changes_nothing_beyond_rounding = None  # type: ignore[assignment]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_beta_one_is_the_first_and_zero_the_last(self, dtype: torch.dtype) -> None:
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        for beta, index in ((1.0, 0), (0.0, -1)):
            assert same_bits(self.merged(replace(case, method={"beta": beta})), case.tensors[index])

    def test_another_checkpoint_moves_the_average_by_one_step(self) -> None:
        case = self.random_case((40, 50), seed=3)
        before = self.merged(replace(case, tensors=case.tensors[:-1], sources=case.sources[:-1]))
        step = 0.9 * before + 0.1 * case.tensors[-1]
        torch.testing.assert_close(self.merged(case), step, rtol=1e-6, atol=1e-6)

    def test_worked_example(self) -> None:
        assert self.merged(self.case([1.0, 2.0])).item() == pytest.approx(1.1)
        assert self.merged(self.case([1.0, 2.0, 3.0])).item() == pytest.approx(1.29)


def placed(layer: int | None) -> Place:
    """Return the place of a tensor in a layer, or of the final norm."""
    if layer is None:
        return Place("model.norm.weight", "norm", None, 1.0)
    return Place(f"model.layers.{layer}.mlp.up_proj.weight", "mlp", layer, 0.0)


class TestLayerSwap(MethodContract):
    """Two experts in layers."""

    name = "layer_swap"

    def expected(self, case: Case) -> Expected:
        bottom, top, width = (int(case.number(name)) for name in ("bottom", "top", "transition"))
        below, above = (width if zone else 0 for zone in (bottom, top))
        between = case.layers - bottom - below - above - top
        mixed = case.number("transition_weight")
        shares = [0.0] * bottom + [mixed] * below + [1.0] * between + [mixed] * above + [0.0] * top
        assert len(shares) == case.layers
        layer = case.place.layer
        task = float(case.method["ends"] == "task") if layer is None else shares[layer]
        return summed(case, (task, 1 - task))

    def sensible(self, case: Case) -> Case:
        return replace(case, layers=10, place=placed((*range(10), None)[case.seed % 11]))

    def selecting(self, index: int, count: int) -> Parameters:
        return {"bottom": 4.0 * index, "top": 0.0}, [{}, {}]

    def averaging(self, count: int) -> Parameters:
        return {"transition_weight": 0.3, "transition": 1.0}, [{}, {}]

    # Sources have roles: what holds is that they and their shares can be exchanged where both count.
    def permuted(self, case: Case, order: Sequence[int]) -> Case:
        case = replace(case, method={**case.method, "transition": 1.0, "transition_weight": 0.3})
        return replace(super().permuted(case, order), method={**case.method, "transition_weight": 0.7})

    def test_order_of_the_sources_changes_nothing_beyond_rounding(self) -> None:  # type: ignore[override]
        case = self.random_case((40, 50), seed=3, transition=1.0, transition_weight=0.3)
        merged = self.merged(self.permuted(case, (1, 0)))
        torch.testing.assert_close(merged, self.merged(case), rtol=1e-5, atol=1e-6)

    def layers_of(self, layers: int, **method: Scalar) -> list[float]:
        """Return the share of the task expert in each layer."""
        case = self.case([1.0, 0.0], **method)
        return [self.merged(replace(case, layers=layers, place=placed(i))).item() for i in range(layers)]

    def test_worked_example(self) -> None:
        shares = self.layers_of(8, bottom=2.0, top=1.0, transition=1.0, transition_weight=0.5)
        assert shares == [0, 0, 0.5, 1, 1, 1, 0.5, 0]

    def test_numbers_of_layers_are_rounded_down(self) -> None:
        assert self.layers_of(4, bottom=1.9, top=0.9, transition=1.5) == [0, 0.5, 1, 1]

    def test_no_transition_without_layers_next_to_it(self) -> None:
        assert self.layers_of(4, bottom=0.0, top=1.0, transition=1.0) == [1, 1, 0.5, 0]

    @pytest.mark.parametrize(("ends", "index"), [("task", 0), ("language", 1)])
    def test_ends_come_from_the_expert_asked_for(self, ends: str, index: int) -> None:
        case = replace(self.random_case((7,), seed=4, ends=ends), place=placed(None))
        assert same_bits(self.merged(case), case.tensors[index])

    @pytest.mark.parametrize("layer", [None, 0, 3])
    def test_zones_that_overlap_are_refused_at_every_tensor(self, layer: int | None) -> None:
        case = self.case([1.0, 0.0], bottom=2.0, top=1.0, transition=1.0)
        with pytest.raises(CandidateError, match="take 5 layers, but the model has 4"):
            self.merged(replace(case, layers=4, place=placed(layer)))
        assert self.merged(replace(case, layers=5, place=placed(layer))).isfinite()


class TestPassthrough(MethodContract):
    """One source."""

    name = "passthrough"

    def expected(self, case: Case) -> Expected:
        return summed(case, case.numbers("scale"))

    def averaging(self, count: int) -> Parameters:
        return {}, [{}]

    # There is but one source to select, and no order.
    test_parameters_that_select_one_source_give_it = None  # type: ignore[assignment]
    test_order_of_the_sources_changes_nothing_beyond_rounding = None  # type: ignore[assignment]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_source_passes_bit_for_bit(self, dtype: torch.dtype) -> None:
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        assert same_bits(self.merged(case), case.tensors[0])

    def test_agrees_with_mergekit(self) -> None:
        # mergekit 0.1.5's merge function with scale 0.6, called in float32.
        case = self.case([[1.0, -1.5, 0.5, 2.5, 0.25, -1.0]], [{"scale": 0.6}])
        np.testing.assert_allclose(flat(self.merged(case)), [0.6, -0.9, 0.3, 1.5, 0.15, -0.6], atol=1e-6)
