"""The Triton kernels give the bits of the compiled loops; on a GPU only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from evomerge.merging import loops
from evomerge.merging.compiled import affine, thinned
from evomerge.merging.keeps import ALL_ABOVE, Band, Election, Graded, Keep
from tests.contracts.method import same_bits
from tests.merging.recipes import METHODS, models, usual
from tests.merging.test_live import live_of, state
from tests.merging.test_loops import DTYPES, SPECIAL, N, keeps, numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EXACT = {
    *("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("breadcrumbs", "breadcrumbs_ties", "passthrough"),
}
"""Methods that are nothing but kernels, with numbers that no sum over a tensor goes into."""


@pytest.fixture(scope="module")
def fused() -> Any:
    return pytest.importorskip("evomerge.merging.fused")


def on_gpu(keep: Keep) -> Keep:
    return dataclasses.replace(keep, codes=keep.codes.cuda()) if isinstance(keep, Graded) else keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 12, 16])
def test_weighted_sums_are_the_same_bits(fused: Any, count: int, dtype: torch.dtype) -> None:
    tensors = [numbers(dtype, seed) for seed in range(count)]
    factors = [0.7 - 0.3 * i for i in range(count)]
    wanted, got = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype, device="cuda")
    affine.weighted_sum(tensors, factors, wanted)
    fused.weighted_sum([tensor.cuda() for tensor in tensors], factors, got)
    assert same_bits(got.cpu(), wanted)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_special_number_is_read_and_rounded_alike(
    fused: Any, dtype: torch.dtype, out: torch.dtype
) -> None:
    values = torch.cat([torch.tensor(SPECIAL), torch.linspace(-70_000, 70_000, 5_001)]).to(dtype)
    wanted = (values.float() + 0.0).to(out)
    got = torch.empty_like(values, dtype=out, device="cuda")
    fused.weighted_sum([values.cuda(), torch.zeros_like(values).cuda()], (1.0, 0.0), got)
    assert torch.equal(got.isnan().cpu(), wanted.isnan())
    assert same_bits(got.cpu()[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.parametrize("start", [0, 1, 3, 16])
def test_parts_that_begin_anywhere_are_the_same_bits(fused: Any, start: int) -> None:
    tensors = [numbers(torch.bfloat16, seed)[start:] for seed in range(3)]
    wanted = torch.empty(N - start, dtype=torch.bfloat16)
    got = torch.empty(N, dtype=torch.bfloat16, device="cuda")[start:]
    affine.weighted_sum(tensors, (0.5, 0.3, 0.2), wanted)
    fused.weighted_sum([numbers(torch.bfloat16, s).cuda()[start:] for s in range(3)], (0.5, 0.3, 0.2), got)
    assert same_bits(got.cpu(), wanted)


@pytest.mark.parametrize("election", [Election(False), Election(True), Election(True, True, -1)], ids=str)
@pytest.mark.parametrize("kind", ["band", "draw", "graded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thinned_merges_are_the_same_bits(
    fused: Any, kind: str, election: Election, dtype: torch.dtype
) -> None:
    base, *tensors = ((numbers(torch.float32, i) * 8).round().div(8).to(dtype) for i in range(4))
    wanted, got = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype, device="cuda")
    thinned.merge_thinned(base, tensors, keeps(kind), (0.5, 1.5, 2.5), election, 0.9, wanted)
    moved = [tensor.cuda() for tensor in tensors]
    own = [on_gpu(keep) for keep in keeps(kind)]
    fused.merge_thinned(base.cuda(), moved, own, (0.5, 1.5, 2.5), election, 0.9, got)
    assert same_bits(got.cpu(), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_none_does_not_vanish_in_a_vote(fused: Any, bad: float) -> None:
    base, *tensors = (numbers(torch.float32, i, 100).cuda() for i in range(4))
    tensors[1][50] = bad
    for election in (Election(False), Election(True), Election(True, True)):
        out = torch.empty(100, device="cuda")
        fused.merge_thinned(base, tensors, [Band(0.5, ALL_ABOVE)] * 3, (0.5,) * 3, election, 1.0, out)
        assert out.isfinite().logical_not().nonzero().tolist() == [[50]]


def test_more_inputs_than_a_kernel_takes_go_the_way_of_torch() -> None:
    tensors = [numbers(torch.float32, seed, 1000) for seed in range(20)]
    wanted, got = torch.empty(1000), torch.empty(1000, device="cuda")
    affine.weighted_sum(tensors, [0.05] * 20, wanted)
    loops.weighted_sum([tensor.cuda() for tensor in tensors], [0.05] * 20, got)
    torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_on_a_gpu_what_it_gives_on_a_cpu(method: str, tmp_path: Any) -> None:
    checkpoints = models(tmp_path, dtype=torch.float32, hidden=64)
    recipe = usual(method, checkpoints)
    found = []
    for device in ("cpu", "cuda"):
        live = live_of(checkpoints, recipe.reference.name, device=device)
        live.apply(usual(method, checkpoints, 0.1))
        live.apply(recipe)
        found.append({name: tensor.cpu() for name, tensor in state(live.model).items()})
    for name, tensor in found[0].items():
        if method in EXACT:
            assert same_bits(found[1][name], tensor), name
        else:
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)
