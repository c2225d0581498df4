"""The live model is the exported model: every parameter, every logit, candidate after candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import CandidateError, SourceError
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import write_model
from evomerge.recipe import Recipe, parse_recipe
from tests.checkpoints.tiny import FAMILIES, edit_json
from tests.contracts.method import same_bits
from tests.merging.recipes import METHODS, by_identity, models, recipe_of, usual

IDS = torch.tensor([[1, 5, 9, 13, 21, 34, 2, 60]])


def live_of(checkpoints: dict[str, Checkpoint], reference: str = "base", **options: Any) -> LiveModel:
    everyone = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints.values()}
    return LiveModel(everyone, checkpoints[reference], checkpoints[reference], **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def state(model: Any) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_model(live: Any, loaded: Any) -> None:
    first, second = state(live), state(loaded)
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first[name], second[name])] == []
    assert type(live) is type(loaded)
    assert live.dtype == loaded.dtype
    assert not live.training
    assert same_bits(logits(live), logits(loaded))


def exported(recipe: Recipe, checkpoints: dict[str, Checkpoint], target: Path) -> Any:
    write_model(recipe, checkpoints, target)
    return AutoModelForCausalLM.from_pretrained(target)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "llama bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "llama float16": ("llama", {"dtype": torch.float16}),
    "gemma2 bfloat16": ("gemma2", {"dtype": torch.bfloat16}),
    "mixtral bfloat16": ("mixtral", {"dtype": torch.bfloat16}),
    "llama tied": ("llama", {"config": {"tie_word_embeddings": True}}),
    "qwen2 tied bfloat16": ("qwen2", {"config": {"tie_word_embeddings": True}, "dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_live_model_is_the_exported_one_candidate_after_candidate(case: str, tmp_path: Path) -> None:
    model_type, options = CASES[case]
    checkpoints = models(tmp_path, model_type, count=2, **options)
    recipes = [usual("dare_ties", checkpoints), usual("ties", checkpoints, 0.2)]
    live = live_of(checkpoints)
    states = []
    for number in (0, 1, 0):
        live.apply(recipes[number])
        states.append(state(live.model))
        if len(states) < 3:
            assert_same_model(live.model, exported(recipes[number], checkpoints, tmp_path / f"out{number}"))
    assert all(same_bits(states[2][name], tensor) for name, tensor in states[0].items())
    assert any(not same_bits(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_live_what_it_is_in_a_file(
    method: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    recipe = usual(method, checkpoints)
    live = live_of(checkpoints, recipe.reference.name)
    live.apply(usual(method, checkpoints, 0.1))
    live.apply(recipe)
    assert_same_model(live.model, exported(recipe, checkpoints, tmp_path / "out"))


def test_dense_model_is_built_once(checkpoints: dict[str, Checkpoint]) -> None:
    live = live_of(checkpoints)
    live.apply(usual("ties", checkpoints))
    first = live.model
    live.apply(usual("dare_linear", checkpoints))
    assert live.model is first


def test_budget_changes_no_bit(checkpoints: dict[str, Checkpoint]) -> None:
    states = []
    for budget in (None, 0, 50_000):
        live = live_of(checkpoints, budget_bytes=budget)
        live.apply(usual("ties", checkpoints, 0.1))
        live.apply(usual("ties", checkpoints))
        states.append(state(live.model))
    assert all(same_bits(states[0][name], other[name]) for other in states[1:] for name in other)


def test_dtype_of_the_recipe_is_that_of_the_model(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    live = live_of(checkpoints)
    for number, dtype in enumerate((None, "bfloat16", None, "float16")):
        recipe = usual("ties", checkpoints, dtype=dtype)
        live.apply(recipe)
        assert live.model.dtype == (getattr(torch, dtype) if dtype else torch.float32)
        assert_same_model(live.model, exported(recipe, checkpoints, tmp_path / str(number)))


def test_dtype_may_be_forced_on_the_model(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    recipe = usual("ties", checkpoints, dtype="bfloat16")
    live = live_of(checkpoints, dtype="float32")
    for shift in (0.1, 0.0):
        live.apply(usual("ties", checkpoints, shift, dtype="bfloat16"))
    write_model(recipe, checkpoints, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_model(live.model, loaded)


def test_config_that_names_another_dtype_than_the_weights_have_is_followed_as_transformers_does(
    tmp_path: Path,
) -> None:
    checkpoints = models(tmp_path, count=2)
    edit_json(checkpoints["base"].path / "config.json", dtype="bfloat16")
    checkpoints["base"] = Checkpoint.open(checkpoints["base"].path)
    live = live_of(checkpoints)
    for shift in (0.1, 0.0):
        live.apply(usual("ties", checkpoints, shift))
    loaded = exported(usual("ties", checkpoints), checkpoints, tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert_same_model(live.model, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_config_without_dtype_leaves_it_to_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoints = models(tmp_path, count=2, dtype=dtype)
    edit_json(checkpoints["base"].path / "config.json", dtype=None)
    checkpoints["base"] = Checkpoint.open(checkpoints["base"].path)
    live = live_of(checkpoints)
    live.apply(usual("ties", checkpoints))
    assert_same_model(live.model, exported(usual("ties", checkpoints), checkpoints, tmp_path / "out"))
    assert live.model.dtype == dtype


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
@pytest.mark.parametrize("alike", [True, False])
def test_head_stored_beside_the_embedding_it_is_tied_to_is_followed_as_transformers_does(
    alike: bool, method: str, tmp_path: Path
) -> None:
    """A type that is tied by default, whose config does not say so: nothing tells before it is loaded."""
    checkpoints = models(tmp_path, "smollm3", count=2, config={"tie_word_embeddings": False})
    for name, checkpoint in checkpoints.items():
        path = checkpoint.path / "model.safetensors"
        tensors = load_file(path)
        if alike:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, {"format": "pt"})
        edit_json(checkpoint.path / "config.json", tie_word_embeddings=None)
        checkpoints[name] = Checkpoint.open(checkpoint.path)
    live = live_of(checkpoints, "a" if method == "linear" else "base")
    live.apply(recipe_of(method, checkpoints))  # nothing is dropped: what was alike stays so
    for number, shift in enumerate((0.1, 0.0)):
        recipe = usual(method, checkpoints, shift)
        live.apply(recipe)
        loaded = exported(recipe, checkpoints, tmp_path / f"out{number}")
        tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert tied == (alike and method == "linear"), "what this test is about"
        assert_same_model(live.model, loaded)


def test_generation_config_and_tokenizer_are_taken_over(tmp_path: Path) -> None:
    checkpoints = models(tmp_path, count=2)
    written = GenerationConfig(max_new_tokens=7, temperature=0.25, do_sample=True, eos_token_id=[2, 3])
    written.save_pretrained(checkpoints["base"].path)
    live = live_of(checkpoints)
    for shift in (0.0, 0.1):
        live.apply(usual("ties", checkpoints, shift))
        assert live.model.generation_config.max_new_tokens == 7
        assert live.model.generation_config.eos_token_id == [2, 3]
    loaded = exported(usual("ties", checkpoints), checkpoints, tmp_path / "out")
    assert live.model.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert live.tokenizer.decode(live.tokenizer("abc")["input_ids"]) == "abc"


def test_bad_candidate_leaves_a_model_that_takes_the_next_one(checkpoints: dict[str, Checkpoint]) -> None:
    weights: dict[str, Any] = {
        "a": {"weight": [{"match": "layers.1", "value": -0.5}, {"value": 0.5}]},
        "b": {"weight": 0.5},
    }
    bad = recipe_of("linear", {name: checkpoints[name] for name in ("base", "a", "b")}, weights)
    good = usual("linear", checkpoints)
    live, fresh = live_of(checkpoints, "a"), live_of(checkpoints, "a")
    fresh.apply(good)
    with pytest.raises(CandidateError):
        live.apply(bad)
    live.apply(good)
    with pytest.raises(CandidateError):
        live.apply(bad)
    live.apply(good)
    assert_same_model(live.model, fresh.model)


def test_tensor_that_the_config_calls_for_and_nobody_has_is_named(tmp_path: Path) -> None:
    checkpoints = models(tmp_path, count=2)
    for name, checkpoint in checkpoints.items():
        path = checkpoint.path / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, {"format": "pt"})
        checkpoints[name] = Checkpoint.open(checkpoint.path)
    with pytest.raises(SourceError, match=r"base: lacks tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        live_of(checkpoints).apply(usual("ties", checkpoints))


def test_model_needs_only_the_checkpoints_of_its_recipes(checkpoints: dict[str, Checkpoint]) -> None:
    recipe = usual("slerp", checkpoints)
    live = LiveModel(by_identity(recipe, checkpoints), checkpoints["a"], checkpoints["base"])
    live.apply(recipe)
    assert logits(live.model).isfinite().all()


def test_global_random_state_is_left_alone(checkpoints: dict[str, Checkpoint]) -> None:
    before = torch.get_rng_state()
    live = live_of(checkpoints)
    live.apply(usual("dare_ties", checkpoints))
    live.apply(usual("dare_ties", checkpoints, 0.1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model_of_other_layers_is_the_exported_one(family: str, tmp_path: Path) -> None:
    checkpoints = models(tmp_path, family, layers=4)
    plain = usual("linear", checkpoints)
    slices = [{"layers": {"a": [0, 3], "b": [1, 4], "c": [0, 3]}}, {"layers": {"b": [2, 4]}}]
    sliced = parse_recipe({**plain.to_json(), "slices": slices}, "test")
    live = live_of(checkpoints, "a")
    for i, recipe in enumerate((sliced, plain, sliced)):
        live.apply(recipe)
        assert_same_model(live.model, exported(recipe, checkpoints, tmp_path / f"out{i}"))
    assert live.model.config.num_hidden_layers == 5
