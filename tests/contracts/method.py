"""What every merge method promises, as a class to inherit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.catalogue import CATALOGUE, Parameter
from evomerge.merging import blocks
from evomerge.merging.methods import KERNELS, Sources, Values
from evomerge.recipe import Scalar
from evomerge.records import Place

Array = npt.NDArray[np.float64]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (2,), (7,), (3, 5), (64,), (2, 3, 4), (1, 129))
EXACT_NUMBERS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0)
"""Multiples of 1/4: with deltas that are multiples of 1/8, float32 makes no rounding error."""


PLACE = Place("model.layers.1.mlp.up_proj.weight", "mlp", 1, 1 / 3)


@dataclass(frozen=True)
class Case:
    """One tensor of every checkpoint, and the parameters to merge them with.

    Attributes:
        base: The base's tensor; None for methods without one.
        tensors: The sources' tensors.
        method: Parameters of the method.
        sources: Parameters of each source.
        seed: Of the masks.
        exact: Whether float32 computes every sum of this case without error.
        place: Where the tensor sits.
        layers: Number of layers of the model.
    """

    base: Tensor | None
    tensors: tuple[Tensor, ...]
    method: Mapping[str, Scalar]
    sources: tuple[Mapping[str, Scalar], ...]
    seed: int = 0
    exact: bool = False
    place: Place = PLACE
    layers: int = 4

    @property
    def keys(self) -> tuple[str, ...]:
        """What identifies the sources: their content, so that it moves along when they are permuted."""
        return tuple(hashlib.sha256(raw(tensor.float())).hexdigest() for tensor in self.tensors)

    @property
    def inputs(self) -> Sources:
        """What the kernel is given."""
        return Sources(self.base, self.tensors, self.keys, self.place, self.layers)

    def numbers(self, name: str) -> list[float]:
        """Return a parameter of every source."""
        return [float(source[name]) for source in self.sources]

    def number(self, name: str) -> float:
        """Return a parameter of the method."""
        return float(self.method[name])

    @property
    def deltas(self) -> list[Array]:
        """Return the flat deltas in float64."""
        assert self.base is not None
        return [flat(tensor) - flat(self.base) for tensor in self.tensors]


@dataclass(frozen=True)
class Expected:
    """A result in float64, flat.

    Attributes:
        value: What the formula gives.
        size: Sum of the magnitudes of all terms, to which rounding errors are relative.
        unclear: Entries where rounding may turn a decision of the method.
    """

    value: Array
    size: Array
    unclear: npt.NDArray[np.bool_]


def flat(tensor: Tensor) -> Array:
    return tensor.detach().double().reshape(-1).numpy().copy()


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def scaled(factor: float) -> dict[str, Any]:
    """Return the parameter whose name is a word of Python's."""
    return {"lambda": factor}


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and raw(first) == raw(second)


@dataclass
class Single:
    """A model of one tensor, as `Kernel.whole` sees it."""

    values: Values
    tensors: Sources
    state: Any

    def sources(self) -> Sources:
        return self.tensors

    def prepared(self) -> Any:
        return self.state


def merged(name: str, case: Case, dtype: torch.dtype | None = None, prepared: Any = ...) -> Tensor:
    """Return what the kernel makes of a case, in the first source's dtype unless one is given."""
    kernel = KERNELS[name]
    values = Values(case.method, case.sources, case.seed)
    state = kernel.prepare(case.inputs, values) if prepared is ... else prepared
    if kernel.method.whole_model:
        values = replace(values, whole=kernel.whole([Single(values, case.inputs, state)]))
    out = torch.full(case.tensors[0].shape, float("nan"), dtype=dtype or case.tensors[0].dtype)
    kernel.merge(case.inputs, state, values, out)
    return out


def draws(parameter: Parameter, exact: bool) -> st.SearchStrategy[Any]:
    """Return any valid value of a parameter."""
    if parameter.choices:
        return st.sampled_from(parameter.choices)
    low = -2.0 if parameter.valid_low is None else parameter.valid_low
    high = 2.0 if parameter.valid_high is None else parameter.valid_high
    if exact and parameter.name != "density":
        return st.sampled_from([number for number in EXACT_NUMBERS if low <= number <= high])
    ends = [number for number in (0.0, 1.0) if low <= number <= high] or [low]
    return st.one_of(st.sampled_from(ends), st.floats(low, high, width=16))


class MethodContract:
    """Inherit, set `name`, and give the formula and what selects one source."""

    name: str
    bit_equal_selection: ClassVar[bool] = True
    """Whether selecting one source gives it bit for bit, also in float32."""

    # -- what a method says about itself -------------------------------------------------------------------

    def expected(self, case: Case) -> Expected:
        """Compute the case by the published formula, slowly, in float64."""
        raise NotImplementedError

    def selecting(self, index: int, count: int) -> tuple[dict[str, Scalar], list[dict[str, Scalar]]]:
        """Return parameters that give source `index` of `count`: of the method, of each source."""
        raise NotImplementedError

    def averaging(self, count: int) -> tuple[dict[str, Scalar], list[dict[str, Scalar]]]:
        """Return parameters that give the common source when all sources are the same."""
        raise NotImplementedError

    def permuted(self, case: Case, order: Sequence[int]) -> Case:
        """Return the same merge with the sources in another order."""
        return replace(
            case,
            tensors=tuple(case.tensors[i] for i in order),
            sources=tuple(case.sources[i] for i in order),
        )

    # -- helpers -------------------------------------------------------------------------------------------

    def merged(self, case: Case, dtype: torch.dtype | None = None, prepared: Any = ...) -> Tensor:
        return merged(self.name, case, dtype, prepared)

    def prepared(self, case: Case) -> Any:
        return KERNELS[self.name].prepare(case.inputs, Values(case.method, case.sources, case.seed))

    def parameters(
        self, method: Mapping[str, Scalar], sources: Sequence[Mapping[str, Scalar]]
    ) -> dict[str, Any]:
        """Return both scopes' parameters, those left out at their default, as arguments of `Case`."""
        table = CATALOGUE[self.name].parameters
        defaults: dict[str, dict[str, Any]] = {"method": {}, "source": {}}
        for parameter in table:
            defaults[parameter.scope][parameter.name] = parameter.default
        return {
            "method": {**defaults["method"], **method},
            "sources": tuple({**defaults["source"], **source} for source in sources),
        }

    def case(
        self,
        sources: Sequence[Any],
        parameters: Sequence[Mapping[str, Scalar]] | None = None,
        *,
        base: Any = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **method: Any,
    ) -> Case:
        """Return a case from nested lists or tensors; `parameters` are those of the sources."""
        tensors = tuple(torch.as_tensor(source).to(dtype) for source in sources)
        start = (
            torch.as_tensor(base).to(dtype) if CATALOGUE[self.name].takes_base and base is not None else None
        )
        return Case(start, tensors, **self.parameters(method, parameters or [{} for _ in sources]), seed=seed)

    def random_case(
        self,
        shape: tuple[int, ...],
        *,
        count: int = 3,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **changes: Any,
    ) -> Case:
        """Return a case with continuous values and unremarkable parameters."""
        count = min(count, CATALOGUE[self.name].max_sources or count)
        generator = np.random.default_rng(seed)
        base = generator.normal(size=shape)
        sources = [base + 0.3 * generator.normal(size=shape) for _ in range(count)]
        weights = generator.uniform(0.2, 1.0, size=count)
        densities = generator.uniform(0.3, 0.8, size=count)
        table = {(parameter.name, parameter.scope) for parameter in CATALOGUE[self.name].parameters}
        parameters = [
            {
                name: float(value)
                for name, value in (("weight", w), ("density", d))
                if (name, "source") in table
            }
            for w, d in zip(weights, densities, strict=True)
        ]
        method: dict[str, Any] = {name: 0.4 for name, _ in table if name == "t"}
        return self.case(sources, parameters, base=base, dtype=dtype, **{**method, **changes})

    @pytest.fixture(autouse=True)
    def _threads_are_put_back(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    # -- the promises --------------------------------------------------------------------------------------

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_result_is_that_of_the_published_formula_in_float64(self, data: st.DataObject) -> None:
        case, out = self._drawn(data)
        expected, got = self.expected(case), flat(self.merged(case, out))
        resolution = torch.finfo(out).eps
        bound = 0.51 * resolution * np.abs(expected.value) + 8e-7 * expected.size + torch.finfo(out).tiny
        wrong = (np.abs(got - expected.value) > bound) & ~expected.unclear
        assert not wrong.any(), (got[wrong], expected.value[wrong])
        if case.exact:
            assert not expected.unclear.any()

    def _drawn(self, data: st.DataObject) -> tuple[Case, torch.dtype]:
        entry = CATALOGUE[self.name]
        shape = data.draw(st.sampled_from(SHAPES), "shape")
        count = data.draw(st.integers(entry.min_sources, entry.max_sources or 4), "sources")
        exact = data.draw(st.booleans(), "exact")
        dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2), "dtypes")
        generator = np.random.default_rng(data.draw(st.integers(0, 2**32), "numbers"))
        base = generator.integers(-8, 9, size=shape) / 8 if exact else generator.normal(size=shape)
        sources = []
        for _ in range(count):
            step = generator.integers(-4, 5, size=shape) / 8 if exact else generator.normal(size=shape) / 3
            sources.append(base + step * data.draw(st.sampled_from((1.0, 1.0, 1.0, 0.0)), "changed"))
        drawn: dict[str, list[Mapping[str, Scalar]]] = {"source": [], "method": []}
        for scope, number in (("source", count), ("method", 1)):
            for _ in range(number):
                here = [parameter for parameter in entry.parameters if parameter.scope == scope]
                drawn[scope].append({p.name: data.draw(draws(p, exact), p.name) for p in here})
        case = self.case(
            sources,
            drawn["source"],
            base=base,
            dtype=dtypes[0],
            seed=data.draw(st.integers(0, 2**63 - 1), "seed"),
            **drawn["method"][0],
        )
        return self.sensible(replace(case, exact=exact)), dtypes[1]

    def sensible(self, case: Case) -> Case:
        """Return the case, changed where its parameters have no merge (weights that cancel out)."""
        weights = case.numbers("weight") if "weight" in case.sources[0] else [1.0]
        if case.method.get("normalize") and abs(sum(weights)) < 0.1:
            return replace(case, method={**case.method, "normalize": False})
        return case

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_identical_sources_give_the_source(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = self.random_case(shape, dtype=dtype, seed=1)
        method, sources = self.averaging(len(case.tensors))
        same = replace(
            case, tensors=(case.tensors[0],) * len(case.tensors), **self.parameters(method, sources)
        )
        if dtype == torch.float32:
            torch.testing.assert_close(self.merged(same), case.tensors[0], rtol=1e-6, atol=1e-6)
        else:
            assert same_bits(self.merged(same), case.tensors[0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("index", [0, 1, -1])
    def test_parameters_that_select_one_source_give_it(self, index: int, dtype: torch.dtype) -> None:
        case = self.random_case((70_001,), dtype=dtype, seed=2)
        count = len(case.tensors)
        method, sources = self.selecting(index % count, count)
        result = self.merged(replace(case, **self.parameters(method, sources)))
        if self.bit_equal_selection:
            assert same_bits(result, case.tensors[index % count])
        else:
            torch.testing.assert_close(result, case.tensors[index % count], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
    def test_order_of_the_sources_changes_nothing_beyond_rounding(self, order: tuple[int, ...]) -> None:
        case = self.random_case((40, 50), seed=3)
        order = tuple(i for i in order if i < len(case.tensors))
        torch.testing.assert_close(
            self.merged(self.permuted(case, order)), self.merged(case), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("out", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sum_is_kept_in_float32_and_rounded_once(self, dtype: torch.dtype, out: torch.dtype) -> None:
        case = self.random_case((33, 17), dtype=dtype, seed=4)
        assert same_bits(self.merged(case, out), self.merged(case, torch.float32).to(out))

    def test_sources_of_different_dtypes_are_merged_as_the_numbers_they_are(self) -> None:
        case = self.random_case((33, 17), dtype=torch.bfloat16, seed=5)
        mixed = replace(case, tensors=(case.tensors[0].float(), *case.tensors[1:]))
        wide = replace(case, tensors=tuple(tensor.float() for tensor in case.tensors))
        state = self.prepared(wide)
        assert same_bits(self.merged(mixed, torch.float32, state), self.merged(wide, prepared=state))

    def test_inputs_stay_as_they_are(self) -> None:
        case = self.random_case((3, 70_000), seed=6)
        inputs = [*case.tensors, *([case.base] if case.base is not None else [])]
        before = [raw(tensor) for tensor in inputs]
        self.merged(case)
        assert [raw(tensor) for tensor in inputs] == before

    def test_prepared_state_serves_any_number_of_candidates(self) -> None:
        case = self.random_case((3, 70_000), seed=7)
        other = self.random_case((3, 70_000), seed=8)
        other = replace(case, sources=other.sources)
        state = self.prepared(case)
        first = self.merged(case, prepared=state)
        second = self.merged(other, prepared=state)
        assert same_bits(first, self.merged(case)), "as if prepared for this candidate alone"
        assert same_bits(second, self.merged(other))
        assert same_bits(first, self.merged(case, prepared=state))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_block_size_changes_no_bit(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        cases = [self.random_case((n,), dtype=dtype, seed=9) for n in (1_003, 2 * blocks.BLOCK_ELEMENTS + 37)]
        whole = [self.merged(case) for case in cases]
        for size in (4_099, blocks.BLOCK_ELEMENTS // 2, 10**9):
            monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", size)
            assert all(same_bits(self.merged(case), w) for case, w in zip(cases, whole, strict=True))
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 13)
        assert same_bits(self.merged(cases[0]), whole[0])

    def test_number_of_threads_changes_no_bit(self) -> None:
        case = self.random_case((100_003,), dtype=torch.bfloat16, seed=10)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(self.merged(case, torch.float32))
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])

    def test_tensor_without_entries_gives_one_without_entries(self) -> None:
        assert self.merged(self.random_case((0, 4))).shape == (0, 4)

    def test_tensor_that_is_not_contiguous_is_refused_rather_than_misread(self) -> None:
        case = self.random_case((6, 4), seed=11)
        turned = replace(
            case,
            base=None if case.base is None else case.base.T,
            tensors=tuple(tensor.T for tensor in case.tensors),
        )
        with pytest.raises(RuntimeError, match="view"):
            self.merged(turned)


class DeltaContract(MethodContract):
    """What every method promises that works on deltas from a base."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sources_equal_to_the_base_give_the_base(self, dtype: torch.dtype) -> None:
        case = self.random_case((11, 13), dtype=dtype, seed=12)
        assert case.base is not None
        still = replace(case, tensors=(case.base,) * len(case.tensors))
        torch.testing.assert_close(
            self.merged(still), case.base, rtol=1e-6 if dtype == torch.float32 else 0, atol=0
        )

    @pytest.mark.parametrize("normalize", [False, True])
    def test_lambda_zero_gives_the_base(self, normalize: bool) -> None:
        case = self.random_case((11, 13), seed=13, normalize=normalize, **scaled(0.0))
        assert case.base is not None
        assert same_bits(self.merged(case), case.base)

    def test_weights_zero_give_the_base(self) -> None:
        case = self.random_case((11, 13), seed=14, normalize=False)
        assert case.base is not None
        silent = replace(case, sources=tuple({**source, "weight": 0.0} for source in case.sources))
        assert same_bits(self.merged(silent), case.base)


class ThinningContract(DeltaContract):
    """What every method promises that thins out deltas by a density."""

    bit_equal_selection = False

    def at_density(self, density: float) -> dict[str, Scalar]:
        """Return the parameters of a source that is thinned out and not weighted."""
        return {"weight": 1.0, "density": density}

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_density_zero_gives_the_base(self, shape: tuple[int, ...]) -> None:
        case = self.random_case(shape, seed=15)
        assert case.base is not None
        empty = replace(case, sources=tuple({**source, "density": 0.0} for source in case.sources))
        assert same_bits(self.merged(empty), case.base)

    def test_density_one_keeps_every_entry(self) -> None:
        case = self.random_case((11, 13), count=1, seed=16)
        full = replace(case, sources=(self.at_density(1.0),))
        torch.testing.assert_close(self.merged(full), case.tensors[0], rtol=1e-6, atol=1e-6)

    def test_entry_kept_at_a_density_is_kept_at_every_higher_one(self) -> None:
        case = self.random_case((5_000,), count=1, seed=17)
        assert case.base is not None
        before = torch.zeros(5_000, dtype=torch.bool)
        for density in (0.05, 0.2, 0.21, 0.5, 0.9, 1.0):
            thinned = replace(case, sources=(self.at_density(density),))
            kept = self.merged(thinned) != case.base
            assert bool((kept | ~before).all())
            assert int(kept.sum()) >= int(before.sum())
            before = kept


def elected(
    pieces: Sequence[Array], weights: Sequence[float], normalize: bool, exact: bool, tie: int = 1
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Return the sign election of TIES over weighted deltas: value, size of the terms, what is unclear.

    The sign with the larger total weighted mass wins, `tie` on a tie; merged are the entries of that sign,
    divided by their weights if `normalize`, where zero entries do not count.
    """
    stack, shares = np.stack(pieces), np.asarray(weights)[:, None]
    vote = stack.sum(0)
    sign = np.where(vote == 0, tie, np.where(vote > 0, 1.0, -1.0))
    agrees = (np.sign(stack) == sign) & (stack != 0)
    value, size = np.where(agrees, stack, 0).sum(0), np.abs(stack).sum(0)
    unclear = np.zeros(value.shape, dtype=bool)
    if not exact:
        unclear |= (np.abs(stack.sum(0)) < 1e-5 * size) & (size > 0) & (len(pieces) > 1)
    if normalize:
        divisor = np.where(agrees, shares, 0).sum(0)
        if not exact:
            unclear |= agrees.any(0) & (np.abs(divisor) < 1e-3)
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
        value, size = value / divisor, size / np.abs(divisor)
    return value, size, unclear
