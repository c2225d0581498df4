"""The merger: the right values for every tensor, the right dtype, the same bits for any memory budget."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.catalogue import CATALOGUE
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging.merger import Merger
from evomerge.merging.methods import KERNELS, Kernel, Sources, Values
from evomerge.recipe import Recipe
from tests.contracts.method import Case as KernelCase
from tests.contracts.method import merged, same_bits
from tests.merging.recipes import METHODS, by_identity, models, recipe_of, usual


class Counting(Kernel):
    """Does what another kernel does, and notes each preparation."""

    def __init__(self, inner: Kernel) -> None:
        self.inner = inner
        self.method = inner.method
        self.prepared_by = inner.prepared_by  # type: ignore[misc]
        self.prepared: list[int] = []

    def prepare(self, sources: Sources, values: Values) -> Any:
        self.prepared.append(values.seed)
        return self.inner.prepare(sources, values)

    def merge(self, sources: Sources, prepared: Any, values: Values, out: Tensor) -> None:
        self.inner.merge(sources, prepared, values, out)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return models(tmp_path_factory.mktemp("models"), layers=3)


def merger_of(recipe: Recipe, checkpoints: dict[str, Checkpoint], budget: int | None = None) -> Merger:
    return Merger(
        by_identity(recipe, checkpoints),
        layout_of(checkpoints[recipe.reference.name]),
        budget_bytes=budget,
    )


def everything(merger: Merger, recipe: Recipe) -> dict[str, Tensor]:
    return {name: merger.merge(recipe, name) for name in merger.layout.places}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


@pytest.fixture
def counting(request: pytest.FixtureRequest) -> Iterator[Counting]:
    name = request.param
    original = KERNELS[name]
    KERNELS[name] = counter = Counting(original)
    yield counter
    KERNELS[name] = original


@pytest.mark.parametrize("method", METHODS)
def test_budget_changes_no_bit(method: str, checkpoints: dict[str, Checkpoint]) -> None:
    first, second = usual(method, checkpoints), usual(method, checkpoints, 0.15)
    mergers = [merger_of(first, checkpoints, budget) for budget in (None, 0, 40_000)]
    results = [[everything(merger, recipe) for recipe in (first, second, first)] for merger in mergers]
    assert all(equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert equal(results[0][0], results[0][2])
    assert not equal(results[0][0], results[0][1])


@pytest.mark.parametrize("method", METHODS)
def test_order_of_work_changes_no_bit(method: str, checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual(method, checkpoints)
    forward = everything(merger_of(recipe, checkpoints), recipe)
    merger = merger_of(recipe, checkpoints)
    backward = {name: merger.merge(recipe, name) for name in reversed(merger.layout.places)}
    assert all(same_bits(forward[name], backward[name]) for name in forward)


@pytest.mark.parametrize("counting", ["ties", "della"], indirect=True)
def test_prepared_state_is_made_once_for_all_candidates(
    counting: Counting, checkpoints: dict[str, Checkpoint]
) -> None:
    method = counting.method.name
    recipe = usual(method, checkpoints)
    merger = merger_of(recipe, checkpoints)
    for shift in (0.0, 0.1, 0.2):
        everything(merger, usual(method, checkpoints, shift))
    assert len(counting.prepared) == len(merger.layout.places)


@pytest.mark.parametrize("counting", ["della"], indirect=True)
def test_without_memory_state_is_prepared_for_every_candidate(
    counting: Counting, checkpoints: dict[str, Checkpoint]
) -> None:
    recipe = usual("della", checkpoints)
    merger = merger_of(recipe, checkpoints, 0)
    for _ in range(2):
        everything(merger, recipe)
    assert len(counting.prepared) == 2 * len(merger.layout.places)


@pytest.mark.parametrize("counting", ["della_linear"], indirect=True)
def test_state_of_a_new_seed_takes_the_place_of_the_old_one(
    counting: Counting, checkpoints: dict[str, Checkpoint]
) -> None:
    name = "model.embed_tokens.weight"
    counting.prepared_by = ("seed",)  # type: ignore[misc]
    recipes = [usual("della_linear", checkpoints, seed=seed) for seed in range(4)]
    size = 3 * checkpoints["a"].tensors[name].nbytes // 2  # a 16-bit rank per entry and source
    merger = merger_of(recipes[0], checkpoints, size)
    results = [merger.merge(recipe, name) for recipe in recipes]
    assert counting.prepared == [0, 1, 2, 3]
    again = merger.merge(recipes[3], name)
    assert counting.prepared == [0, 1, 2, 3], "the newest one fits, as the others have gone"
    assert same_bits(again, results[3])
    assert same_bits(merger.merge(recipes[0], name), results[0])


@pytest.mark.parametrize("counting", ["ties"], indirect=True)
def test_seed_does_not_matter_to_a_method_without_chance(
    counting: Counting, checkpoints: dict[str, Checkpoint]
) -> None:
    recipes = [usual("ties", checkpoints, seed=seed) for seed in (1, 2)]
    merger = merger_of(recipes[0], checkpoints)
    first, second = (everything(merger, recipe) for recipe in recipes)
    assert equal(first, second)
    assert len(counting.prepared) == len(merger.layout.places)


@pytest.mark.parametrize("method", METHODS)
def test_sources_in_another_order_give_the_same_model(
    method: str, checkpoints: dict[str, Checkpoint]
) -> None:
    if CATALOGUE[method].ordered:
        pytest.skip("the order of the sources has a meaning")
    recipe = usual(method, checkpoints)
    turned = recipe.model_copy(update={"sources": recipe.sources[::-1]})
    if method == "slerp":  # t = 0.3 from here is 0.7 from there
        turned = turned.model_copy(update={"parameters": usual("slerp", checkpoints, 0.4).parameters})
    first = everything(merger_of(recipe, checkpoints), recipe)
    second = everything(merger_of(turned, checkpoints), turned)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


def test_every_tensor_gets_the_value_of_its_depth_and_role(checkpoints: dict[str, Checkpoint]) -> None:
    rules = [
        {"match": "layers.1.mlp.up_proj", "value": 0.9},
        {"role": "attention", "value": [0.0, 0.4]},
        {"role": "mlp", "value": [0.1, 0.5, 0.2]},
        {"role": "norm", "match": "model.norm", "value": 0.6},
        {"value": [0.05, 0.35]},
    ]
    recipe = recipe_of(
        "linear",
        checkpoints,
        {"a": {"weight": rules}, "b": {"weight": 0.0}, "c": {"weight": 1.0}, "method": {"normalize": False}},
    )
    expected = {
        "model.embed_tokens.weight": 0.05,
        "lm_head.weight": 0.35,
        "model.norm.weight": 0.6,
        "model.layers.0.self_attn.q_proj.weight": 0.0,
        "model.layers.1.self_attn.q_proj.weight": 0.2,
        "model.layers.2.self_attn.o_proj.weight": 0.4,
        "model.layers.0.mlp.up_proj.weight": 0.1,
        "model.layers.1.mlp.up_proj.weight": 0.9,
        "model.layers.1.mlp.down_proj.weight": 0.5,
        "model.layers.2.mlp.up_proj.weight": 0.2,
        "model.layers.0.input_layernorm.weight": 0.05,
        "model.layers.1.input_layernorm.weight": 0.2,
        "model.layers.2.post_attention_layernorm.weight": 0.35,
    }
    result = everything(merger_of(recipe, checkpoints), recipe)
    for name, weight in expected.items():
        want = weight * checkpoints["a"].tensor(name) + checkpoints["c"].tensor(name)
        torch.testing.assert_close(result[name], want, rtol=1e-6, atol=1e-7)


def test_parameters_of_the_method_may_differ_by_tensor_too(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = recipe_of(
        "slerp", checkpoints, {"method": {"t": [{"role": "mlp", "value": 1.0}, {"value": 0.0}]}}
    )
    result = everything(merger_of(recipe, checkpoints), recipe)
    for name, tensor in result.items():
        assert same_bits(tensor, checkpoints["b" if ".mlp." in name else "a"].tensor(name))


def test_masks_are_keyed_by_content_and_tensor_name(checkpoints: dict[str, Checkpoint]) -> None:
    """What the merger hands to the kernel is what the kernel's own tests take for granted."""
    recipe = recipe_of("dare_linear", checkpoints, {"a": {"density": 0.5}}, seed=4)
    name = "model.layers.1.mlp.up_proj.weight"
    case = KernelCase(
        checkpoints["base"].tensor(name),
        tuple(checkpoints[source].tensor(name) for source in "abc"),
        {"lambda": 1.0, "normalize": False, "rescale": "expectation"},
        ({"weight": 1.0, "density": 0.5}, *[{"weight": 1.0, "density": 1.0}] * 2),
        seed=4,
    )
    keys = tuple(f"{checkpoints[source].fingerprint}\x1f{name}" for source in "abc")
    kernel, out = KERNELS["dare_linear"], torch.empty(case.tensors[0].shape)
    kernel.merge(replace(case.inputs, keys=keys), None, Values(case.method, case.sources, 4), out)
    assert same_bits(merger_of(recipe, checkpoints).merge(recipe, name), out)
    assert not same_bits(merged("dare_linear", case), out)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_recipe_rounds_once_to_nearest(
    dtype: str, method: str, checkpoints: dict[str, Checkpoint]
) -> None:
    wide, narrow = usual(method, checkpoints), usual(method, checkpoints, dtype=dtype)
    results = [everything(merger_of(recipe, checkpoints), recipe) for recipe in (wide, narrow)]
    for name, tensor in results[0].items():
        assert tensor.dtype == torch.float32
        assert same_bits(results[1][name], tensor.to(getattr(torch, dtype)))


def test_without_dtype_every_tensor_keeps_that_of_the_reference(tmp_path: Path) -> None:
    mixed = models(tmp_path, count=2)
    path = mixed["base"].path / "model.safetensors"
    tensors = load_file(path)
    half = {"model.norm.weight": torch.float16, "lm_head.weight": torch.bfloat16}
    save_file(
        {name: tensor.to(half.get(name, tensor.dtype)) for name, tensor in tensors.items()},
        path,
        {"format": "pt"},
    )
    mixed["base"] = Checkpoint.open(mixed["base"].path)
    recipe = usual("task_arithmetic", mixed)
    merger = merger_of(recipe, mixed)
    for name, tensor in everything(merger, recipe).items():
        assert tensor.dtype == half.get(name, torch.float32) == merger.dtype_of(recipe, name)


def test_given_tensor_is_written_and_returned(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual("ties", checkpoints)
    merger, name = merger_of(recipe, checkpoints), "model.layers.0.mlp.up_proj.weight"
    fresh = merger.merge(recipe, name)
    given = torch.full_like(fresh, float("nan"))
    assert merger.merge(recipe, name, given) is given
    assert same_bits(given, fresh)


def test_given_tensor_of_another_dtype_gets_what_the_file_would_hold(
    checkpoints: dict[str, Checkpoint],
) -> None:
    recipe = usual("ties", checkpoints, dtype="bfloat16")
    merger, name = merger_of(recipe, checkpoints), "model.layers.0.mlp.up_proj.weight"
    given = torch.empty(checkpoints["a"].tensors[name].shape)
    merger.merge(recipe, name, given)
    assert same_bits(given, merger.merge(recipe, name).float())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_tensor_of_integers_is_copied_from_the_reference(
    method: str, dtype: str | None, tmp_path: Path
) -> None:
    counted = models(tmp_path, count=2)
    for number, (name, checkpoint) in enumerate(counted.items()):
        path = checkpoint.path / "model.safetensors"
        steps = torch.tensor([2**40 + number, number])
        save_file({**load_file(path), "model.layers.0.mlp.steps": steps}, path, {"format": "pt"})
        counted[name] = Checkpoint.open(checkpoint.path)
    recipe = usual(method, counted, dtype=dtype)
    merger = merger_of(recipe, counted)
    copied = merger.merge(recipe, "model.layers.0.mlp.steps")
    assert same_bits(copied, counted[recipe.reference.name].tensor("model.layers.0.mlp.steps"))
    assert merger.dtype_of(recipe, "model.layers.0.mlp.steps") == torch.int64


@pytest.mark.parametrize("method", METHODS)
def test_files_stay_as_they_are(method: str, checkpoints: dict[str, Checkpoint]) -> None:
    before = [Checkpoint.open(checkpoint.path).fingerprint for checkpoint in checkpoints.values()]
    recipe = usual(method, checkpoints)
    for tensor in everything(merger_of(recipe, checkpoints), recipe).values():
        tensor.zero_()
    after = {
        name: checkpoint.tensor("model.norm.weight").abs().sum() for name, checkpoint in checkpoints.items()
    }
    assert [Checkpoint.open(checkpoint.path).fingerprint for checkpoint in checkpoints.values()] == before
    assert all(float(size) > 0 for size in after.values()), "no view of a file was handed out"


def test_unknown_source_is_an_error_in_one_line(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual("linear", checkpoints)
    merger = Merger({}, layout_of(checkpoints["a"]))
    with pytest.raises(RecipeError, match=r"^source a \(.*\) is not among the checkpoints at hand$"):
        merger.merge(recipe, "model.norm.weight")


def test_sources_may_be_identified_by_path(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual("linear", checkpoints, fingerprints=False)
    assert everything(merger_of(recipe, checkpoints), recipe)


EVERYWHERE = """
import hashlib, sys
from pathlib import Path
import torch
from tests.contracts.method import raw
from tests.merging.recipes import by_identity, usual
from tests.merging.test_merger import merger_of
from evomerge.checkpoints.source import Checkpoint

torch.set_num_threads(int(sys.argv[2]))
checkpoints = {path.name: Checkpoint.open(path) for path in sorted(Path(sys.argv[1]).iterdir())}
checkpoints = {"base": checkpoints.pop("base"), **checkpoints}
for method in sys.argv[3:]:
    recipe = usual(method, checkpoints)
    merger = merger_of(recipe, checkpoints)
    digest = hashlib.sha256(b"".join(raw(merger.merge(recipe, name)) for name in merger.layout.places))
    print(method, digest.hexdigest())
"""


def test_every_process_makes_the_same_model(checkpoints: dict[str, Checkpoint]) -> None:
    methods = ["slerp", "ties", "dare_ties", "tsv_m"]
    folder = checkpoints["base"].path.parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EVERYWHERE, folder, str(1 + i), *methods],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(i)},
        )
        for i in range(3)
    ]
    outputs = {process.communicate(timeout=300)[0] for process in processes}
    assert len(outputs) == 1
    assert [line.split()[0] for line in outputs.pop().splitlines()] == methods
