"""PCB-Merging: the contract, the worked example of its code, and order statistics by counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.merging.methods.competition import order_statistics
from evomerge.records import Place
from tests.contracts.method import (
    DTYPES,
    SHAPES,
    Array,
    Case,
    DeltaContract,
    Expected,
    Single,
    flat,
    same_bits,
    scaled,
)
from tests.merging.fixture import BASE, TAU

THETA = tuple(BASE + tau for tau in TAU)


@dataclass(frozen=True)
class Competition:
    """What the published code makes of deltas (sources x entries).

    Attributes:
        clipped: The deltas with clipped magnitudes.
        shares: Their shares.
        doubt: How far rounding may move each source's shares (sources x 1).
        edge: Entries at which rounding may decide whether a source has a share at all.
    """

    clipped: Array
    shares: Array
    doubt: Array
    edge: npt.NDArray[np.bool_]


def competed(deltas: Array, ratio: float) -> Competition:
    count, numel = deltas.shape
    magnitudes = np.abs(deltas)
    ordered = np.sort(magnitudes, axis=1)
    low = ordered[:, [int(numel * 1e-4)]]
    high = ordered[:, [int(numel * (1 - 1e-4) - 1)]]
    clipped = np.clip(magnitudes, low, np.maximum(low, high))
    unit = (clipped - low) / np.where(high > low, high - low, 1.0)
    scores = np.exp(count * (unit**2 - 1)) * np.tanh(deltas * deltas.sum(0))
    ordered = np.sort(scores, axis=1)
    least, most = ordered[:, [min(int(numel * (1 - ratio)), numel - 1)]], ordered[:, [-1]]
    width = np.where(most > least, most - least, 1.0)
    raw = (scores - least) / width
    shares = np.where(most > least, np.maximum(raw, 0.0), (scores >= most) & (most > 0))
    doubt = 3e-6 * (1 + np.maximum(np.abs(least), np.abs(most)) / width) * (1 + deltas.std() / 0.1)
    edge = (np.abs(raw) < doubt).any(0) & (shares.sum(0) < 1e3 * doubt.sum())
    return Competition(np.sign(deltas) * clipped, shares, doubt, edge)


class TestPcb(DeltaContract):
    """Entries that compete."""

    name = "pcb"

    def expected(self, case: Case) -> Expected:
        assert case.base is not None
        base, scale = flat(case.base), case.number("lambda")
        deltas, weights = np.stack(case.deltas), np.array(case.numbers("weight"))[:, None]
        found = competed(deltas, case.number("ratio"))
        divisor = np.maximum(found.shares.sum(0), 1e-12)
        value = (weights * found.shares * found.clipped).sum(0) / divisor
        moved = (found.doubt * np.abs(weights * found.clipped - value)).sum(0) / divisor
        moved[found.shares.sum(0) == 0] = 0.0
        size = np.abs(base) + abs(scale) * (
            np.abs(weights * found.clipped).sum(0) + np.abs(base) + moved / 8e-7
        )
        return Expected(base + scale * value, size, found.edge | (found.doubt.max() > 1e-2))

    def sensible(self, case: Case) -> Case:
        """Scores are not exact."""
        return replace(case, exact=False)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_identical_sources_give_the_source(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Of the winners of the competition, but for the largest magnitude, which is clipped."""
        case = self.random_case(shape, dtype=dtype, seed=1)
        assert case.base is not None
        weights = ({"weight": 1.0},) * 3
        same = replace(case, tensors=(case.tensors[0],) * 3, sources=weights)
        same = replace(same, method={**case.method, "ratio": 0.5})
        result = self.merged(same, torch.float32)
        source, base = case.tensors[0].float(), case.base.float()
        taken = torch.isclose(result, source, rtol=1e-5, atol=1e-5)
        dropped = torch.isclose(result, base, rtol=1e-5, atol=1e-5)
        clipped = (source - base).abs() == (source - base).abs().max()
        assert bool((taken | dropped | clipped).all())
        assert not bool(dropped.all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        """Weights are factors of what has won: of one source alone, the chosen fraction is given."""
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        assert case.base is not None
        alone = replace(
            case,
            tensors=(case.tensors[index],),
            sources=({"weight": 1.0},),
            method={**case.method, "ratio": 0.25},
        )
        changed = flat(self.merged(alone, torch.float32)) != flat(case.base)
        assert abs(int(changed.sum()) - 0.25 * 70_001) < (3 if dtype == torch.float32 else 300)
        deltas = np.abs(flat(case.tensors[index]) - flat(case.base))
        assert deltas[changed].min() >= deltas[~changed].max() * 0.99

    def test_worked_example(self) -> None:
        for scope in ("model", "tensor"):
            case = self.case(THETA[:2], base=BASE, ratio=0.5, scope=scope)
            np.testing.assert_allclose(flat(self.merged(case)) - BASE, [4, 3, 0, 0, -3, -4], atol=1e-6)

    def test_shares_of_the_worked_example(self) -> None:
        """The formula that the contract tests against."""
        found = competed(np.stack(TAU[:2]), 0.5)
        assert found.clipped.tolist() == [[4, -1, 2, 0, 3, -4], [2, 3, -2.5, 1, -3, -1]]
        np.testing.assert_allclose(found.shares, [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0.99898137, 0]], atol=1e-8)

    def test_weights_scale_what_a_source_has_won_and_not_its_share(self) -> None:
        case = self.case(THETA[:2], [{"weight": 2.0}, {"weight": 0.5}], base=BASE, ratio=0.5, **scaled(0.5))
        np.testing.assert_allclose(
            flat(self.merged(case)) - BASE, [4, 0.75, 0, 0, -0.75, -4], rtol=1e-6, atol=1e-6
        )

    def test_source_equal_to_the_base_takes_no_share(self) -> None:
        both = self.case([THETA[0], BASE], base=BASE, ratio=1.0)
        found = competed(np.stack([TAU[0], np.zeros(6)]), 1.0)
        won = np.where(found.shares[0] > 0, found.clipped[0], 0.0)
        np.testing.assert_allclose(flat(self.merged(both)) - BASE, won, atol=1e-6)
        assert not found.shares[1].any()

    def test_many_sources_do_not_overflow(self) -> None:
        case = self.random_case((64,), seed=3)
        tensors = case.tensors * 70
        many = replace(case, tensors=tensors, sources=case.sources * 70)
        assert bool(self.merged(many).isfinite().all())

    def views(self, case: Case, sizes: Sequence[int], keys: Sequence[str] = ("a", "b", "c")) -> list[Any]:
        """Return the views of a model whose tensors are the case's, cut into pieces."""
        assert case.base is not None
        values = Values(case.method, case.sources, 0)
        views: list[Any] = []
        for i, start in enumerate(np.cumsum([0, *sizes[:-1]])):
            part = slice(start, start + sizes[i])
            inputs = Sources(
                case.base[part],
                tuple(tensor[part] for tensor in case.tensors),
                tuple(f"{key}\x1f{i}" for key in keys),
                Place(f"t{i}", "mlp", i, 0.0),
                len(sizes),
            )
            views.append(Single(values, inputs, KERNELS["pcb"].prepare(inputs, values)))
        return views

    @pytest.mark.parametrize("sizes", [(9_000, 1, 0, 999), (5_000, 5_000), (10_000,)], ids=str)
    def test_entries_compete_within_the_whole_model(self, sizes: tuple[int, ...]) -> None:
        case = self.random_case((10_000,), seed=4)
        expected = self.merged(case)
        views = self.views(case, sizes)
        whole = KERNELS["pcb"].whole(views)
        pieces = []
        for view in views:
            out = torch.empty_like(view.tensors.tensors[0])
            KERNELS["pcb"].merge(view.tensors, view.state, replace(view.values, whole=whole), out)
            pieces.append(out)
        assert same_bits(torch.cat(pieces), expected)
        apart = replace(case, method={**case.method, "scope": "tensor"})
        assert KERNELS["pcb"].whole(self.views(apart, sizes)) is None
        assert same_bits(self.merged(apart), expected), "one tensor is a model of one tensor"

    def test_tensors_with_different_sources_cannot_compete(self) -> None:
        case = self.random_case((10,), seed=5)
        views = [*self.views(case, (10,)), *self.views(case, (10,), ("a", "b", "d"))]
        with pytest.raises(RecipeError, match="t0 and t0 are judged together but have different sources"):
            KERNELS["pcb"].whole(views)


def numbers(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_011, generator=generator)
    return {
        "normal": normal,
        "ties": (normal * 2).round() / 2,
        "bfloat16": normal.bfloat16().float(),
        "tiny": normal * 1e-42,
        "huge": normal * 1e38,
        "constant": torch.full((20_011,), -3.25),
        "mixed": torch.cat([torch.zeros(10_000), -torch.zeros(11), normal[:10_000]]),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "tiny", "huge", "constant", "mixed"])
@pytest.mark.parametrize("step", [1_000, 20_011])
def test_order_statistics_are_those_of_a_full_sort(kind: str, step: int) -> None:
    vectors = [numbers(kind), numbers("normal")]
    ranks = [0, 1, 5_002, 10_005, 15_007, 20_009, 20_010, 5_002]

    def sweep() -> Iterator[list[Tensor]]:
        return zip(*(vector.split(step) for vector in vectors), strict=True)

    found = order_statistics(sweep, 2, ranks)
    for row, vector in zip(found, vectors, strict=True):
        assert row == vector.sort().values[ranks].tolist()
