"""Layer paths: the live model is what the definition says, and the exported plain checkpoint what that is."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.checkpoints.flows import FLOWS, flow_of, layer_types
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import CandidateError, RecipeError, SourceError
from evomerge.merging.dataflow import assemble
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import open_sources, write_model
from evomerge.recipe import LayerPath, Recipe, parse_recipe
from tests.checkpoints.tiny import edit_json, make_model
from tests.contracts.method import same_bits

IDS = torch.tensor([[1, 5, 9, 13, 21, 34, 2, 60, 7, 11, 3, 18]])
SCALABLE = tuple(kind for kind, flow in FLOWS.items() if not flow.unscalable)
TYPES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        **{"use_sliding_window": True, "sliding_window": 4},
    },
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox sequential": {"use_parallel_residual": False},
}
CASES = (*SCALABLE, "llama tied", "llama biased", "gpt_neox sequential")
SCALES = {
    "plain": (1.0, 1.0, 1.0, 1.0, 1.0),
    "usual": (1.0, 0.8, 1.1, 0.95, 1.2),
    "negative": (1.0, -0.9, 1.1, 1.0, -1.2),
    "negative at the end": (1.0, 0.9, -1.1, 1.0, 1.0),
    "far from one": (1.0, 4.0, 3.0, 0.05, 20.0),
}


def opened(folder: Path, case: str, layers: tuple[int, ...] = (3, 3)) -> dict[str, Checkpoint]:
    kind = case.split()[0]
    found = {}
    for seed, (name, count) in enumerate(zip("abc", layers, strict=False)):
        config = dict(TYPES.get(case, {}))
        if "layer_types" in config:
            config["layer_types"] = (config["layer_types"] * 2)[seed : seed + count]
        found[name] = Checkpoint.open(make_model(folder / name, kind, seed=seed, layers=count, config=config))
    return found


def recipe_of(checkpoints: dict[str, Checkpoint], path: Any, **more: Any) -> Recipe:
    sources = [
        {"name": name, "path": str(found.path), "fingerprint": found.fingerprint}
        for name, found in checkpoints.items()
    ]
    return parse_recipe({"method": "passthrough", "sources": sources, "path": path, **more}, "r")


def path_of(scales: tuple[float, ...]) -> list[str]:
    steps = ("a 0", "b 1", "b 1", "b 2", "a 2")
    return [f"{step} {scale!r}" for step, scale in zip(steps, scales, strict=True)]


def live_of(checkpoints: dict[str, Checkpoint], **options: Any) -> LiveModel:
    everyone = {checkpoint.fingerprint: checkpoint for checkpoint in checkpoints.values()}
    return LiveModel(everyone, checkpoints["a"], checkpoints["a"], **options)


def applied(checkpoints: dict[str, Checkpoint], recipe: Recipe) -> Any:
    live = live_of(checkpoints)
    live.apply(recipe)
    return live.model


def defined(checkpoints: dict[str, Checkpoint], path: LayerPath) -> Any:
    """The model by its definition: copied layers, and a hook that scales the hidden state before each."""
    models = {name: AutoModelForCausalLM.from_pretrained(found.path) for name, found in checkpoints.items()}
    model = models[path.end]
    types = {name: getattr(m.config, "layer_types", None) for name, m in models.items()}
    layers = []
    for number, step in enumerate(path.layers):
        layer = copy.deepcopy(models[step.source].base_model.layers[step.layer])
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number

        def before(module: Any, args: Any, scale: float = step.scale) -> Any:
            return (args[0] * scale, *args[1:])

        layer.register_forward_pre_hook(before)
        layers.append(layer)
    model.base_model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if types[path.end]:
        model.config.layer_types = [types[step.source][step.layer] for step in path.layers]
    return model.eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < tolerance, error


@pytest.mark.parametrize("case", CASES)
def test_live_model_is_the_defined_one_and_the_exported_one(case: str, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, case)
    live = live_of(checkpoints)
    first: Any = None
    for number, (name, scales) in enumerate(SCALES.items()):
        recipe = recipe_of(checkpoints, path_of(scales))
        live.apply(recipe)
        found = logits(live.model)
        # The norms' epsilon is not scaled with the hidden state: that is all that folding changes.
        assert recipe.path is not None
        assert_near(found, logits(defined(checkpoints, recipe.path)), 2e-2 if "far" in name else 1e-3)
        target = write_model(recipe, checkpoints, tmp_path / f"out{number}")
        stock = AutoModelForCausalLM.from_pretrained(target)
        assert type(stock) is type(live.model)
        assert_near(found, logits(stock), 1e-5)
        if number:
            assert float((found - logits(first)).abs().max()) > 1e-3
        else:
            first = stock
            assert_near(found, logits(defined(checkpoints, recipe.path)), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_cache_masks_and_generation_are_those_of_the_plain_model(case: str, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, case)
    recipe = recipe_of(checkpoints, path_of(SCALES["negative"]))
    live = applied(checkpoints, recipe)
    stock = AutoModelForCausalLM.from_pretrained(write_model(recipe, checkpoints, tmp_path / "out"))
    whole = logits(live)
    with torch.no_grad():
        first = live(input_ids=IDS[:, :7], use_cache=True)
        rest = live(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, logits_to_keep=3)
        kept = stock(input_ids=IDS, use_cache=True)
    assert rest.logits.shape[1] == 3
    assert_near(rest.logits, whole[:, -3:], 1e-5)
    assert len(first.past_key_values) == len(kept.past_key_values) == 5
    assert [type(layer) for layer in first.past_key_values.layers] == [
        type(layer) for layer in kept.past_key_values.layers
    ]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones_like(IDS)], 1)
    positions = torch.tensor([[0, 0, *range(IDS.shape[1])]])
    with torch.no_grad():
        shifted = live(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
    assert_near(shifted, whole, 1e-5)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(IDS[:, :5], **settings) for model in (live, stock)]
    assert texts[0].equal(texts[1])
    assert texts[0].shape[1] == 17


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_a_mask_of_four_dimensions_is_taken(case: str, tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, case)
    live = applied(checkpoints, recipe_of(checkpoints, path_of(SCALES["usual"])))
    count = IDS.shape[1]
    seen = torch.tril(torch.ones(count, count, dtype=torch.bool))[None, None]
    assert_near(logits(live, attention_mask=seen), logits(live), 1e-5)
    alone = torch.eye(count, dtype=torch.bool)[None, None]
    positions = torch.zeros_like(IDS)
    found = logits(live, attention_mask=alone, position_ids=positions)
    with torch.no_grad():
        single = live(input_ids=IDS[:, 3:4]).logits
    assert_near(found[:, 3:4], single, 1e-5)


def test_hidden_states_are_those_of_the_path_and_the_sources_stay_as_they_are(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    models = {name: AutoModelForCausalLM.from_pretrained(c.path) for name, c in checkpoints.items()}
    before = {name: logits(model) for name, model in models.items()}
    with torch.no_grad():
        models["a"](input_ids=IDS, output_hidden_states=True)  # installs hooks on its layers
    path = LayerPath.model_validate(path_of(SCALES["negative"]))
    live = assemble(models, path, FLOWS["llama"], "model.layers.{i}.")
    with torch.no_grad():
        states = live(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(states) == 6
    for name, model in models.items():
        assert same_bits(logits(model), before[name])
        assert model.config.num_hidden_layers == 3


def test_no_weight_is_copied_and_building_takes_milliseconds(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "gemma2", (8, 8))
    models = {name: AutoModelForCausalLM.from_pretrained(c.path) for name, c in checkpoints.items()}
    owned = {p.data_ptr() for model in models.values() for p in model.parameters()}
    path = LayerPath.model_validate(["a 0-7 0.9", "b 2-7 -1.1", "a 3-7"])
    assemble(models, path, FLOWS["gemma2"], "model.layers.{i}.")
    started = time.process_time()
    live = assemble(models, path, FLOWS["gemma2"], "model.layers.{i}.")
    assert time.process_time() - started < 0.5
    assert {parameter.data_ptr() for parameter in live.parameters()} <= owned


def test_the_paper_s_starting_point_is_the_first_source(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    live = applied({"a": checkpoints["a"]}, recipe_of({"a": checkpoints["a"]}, ["a 0-2"]))
    assert same_bits(logits(live), logits(AutoModelForCausalLM.from_pretrained(checkpoints["a"].path)))


def test_a_scale_is_no_empty_change(tmp_path: Path) -> None:
    checkpoints = {"a": opened(tmp_path, "llama")["a"]}
    plain, scaled = (applied(checkpoints, recipe_of(checkpoints, ["a 0", f"a 1-2 {s}"])) for s in (1, 0.5))
    assert float((logits(plain) - logits(scaled)).abs().max()) > 1e-3


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "qwen2"])
def test_the_kind_of_attention_goes_with_the_layer_also_where_the_config_does_not_say_it(
    case: str, tmp_path: Path
) -> None:
    checkpoints = opened(tmp_path, case)
    known = AutoConfig.from_pretrained(checkpoints["a"].path).layer_types
    for name in checkpoints:
        edit_json(checkpoints[name].path / "config.json", layer_types=None)
    bare = {name: Checkpoint.open(found.path) for name, found in checkpoints.items()}
    assert "layer_types" not in bare["a"].config
    assert layer_types(bare["a"].config) == known
    assert AutoConfig.from_pretrained(bare["a"].path).layer_types == known
    assert len(set(known)) == 2
    recipe = recipe_of(bare, path_of(SCALES["usual"]))
    stock = AutoModelForCausalLM.from_pretrained(write_model(recipe, bare, tmp_path / "out"))
    assert stock.config.layer_types == [known[i] for i in (0, 1, 1, 2, 2)]
    assert_near(logits(applied(bare, recipe)), logits(stock), 1e-5)


def test_the_ends_may_be_of_a_source_whose_layers_are_not_used(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    recipe = recipe_of(checkpoints, {"layers": ["b 0-2"], "ends": "a"})
    target = write_model(recipe, checkpoints, tmp_path / "out")
    stored = load_file(target / "model.safetensors")
    for name, tensor in stored.items():
        owner = "b" if ".layers." in name else "a"
        assert torch.equal(tensor, checkpoints[owner].tensor(name))
    assert_near(
        logits(applied(checkpoints, recipe)), logits(AutoModelForCausalLM.from_pretrained(target)), 1e-6
    )


def test_sources_may_differ_in_depth(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "qwen2", (2, 4))
    recipe = recipe_of(checkpoints, ["a 0", "b 3 0.7", "b 3", "a 1"])
    target = write_model(recipe, open_sources(recipe), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(target)
    assert stock.config.num_hidden_layers == 4
    assert_near(logits(applied(checkpoints, recipe)), logits(stock), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoints = {
        name: Checkpoint.open(make_model(tmp_path / name, "llama", seed=seed, dtype=dtype))
        for seed, name in enumerate("ab")
    }
    recipe = recipe_of(checkpoints, ["a 0", "b 1 0.7", "a 1"])
    live = applied(checkpoints, recipe)
    stock = AutoModelForCausalLM.from_pretrained(write_model(recipe, checkpoints, tmp_path / "out"))
    assert live.dtype == stock.dtype == dtype
    weight = checkpoints["b"].tensor("model.layers.1.mlp.down_proj.weight")
    assert same_bits(stock.model.layers[1].mlp.down_proj.weight, (weight.float() * (1 / 0.7)).to(dtype))
    assert_near(logits(live).float(), logits(stock).float(), 0.02)


def test_scales_that_cannot_be_folded_are_refused_with_the_nearest_plain_model(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "olmo2")
    scaled, plain = (recipe_of(checkpoints, path_of(SCALES[name])) for name in ("usual", "plain"))
    with pytest.raises(RecipeError, match=r"path\.layers\.1: scales cannot .* same path without scales"):
        open_sources(scaled)
    with pytest.raises(RecipeError, match="scales cannot be folded"):
        applied(checkpoints, scaled)
    stock = AutoModelForCausalLM.from_pretrained(write_model(plain, checkpoints, tmp_path / "out"))
    assert_near(logits(applied(checkpoints, plain)), logits(stock), 1e-6)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mixtral", "fused"), ("mamba", "cache"), ("gemma3n_text", "cache of other"), ("x", "not known")],
)
def test_other_families_are_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"models of type {kind} are not supported: .*{reason}"):
        flow_of({"model_type": kind})


def test_paths_that_the_sources_cannot_have_are_refused(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    recipe = recipe_of(checkpoints, ["a 0", "b 3", "a 2"])
    message = r"path\.layers\.1: b has (the layers 0 to 2|3 layers), got layer 3"
    with pytest.raises(RecipeError, match=message):
        open_sources(recipe)
    with pytest.raises(RecipeError, match=message):
        applied(checkpoints, recipe)
    wide = Checkpoint.open(make_model(tmp_path / "wide", hidden=32, layers=3))
    with pytest.raises(SourceError, match=r"b: hidden_size is 32, but 16 in \"a\""):
        open_sources(recipe_of({"a": checkpoints["a"], "b": wide}, ["a 0", "b 1", "a 2"]))
    windows = {
        name: Checkpoint.open(make_model(tmp_path / name, "mistral", config={"sliding_window": window}))
        for name, window in (("four", 4), ("five", 5))
    }
    with pytest.raises(
        RecipeError, match=r"path\.layers\.1: the attention window of five is 5, but 4 in four"
    ):
        applied({"a": windows["four"], **windows}, recipe_of(windows, ["four 0", "five 1", "four 1"]))


def test_a_merge_that_fails_leaves_no_weights_behind(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    plain = [
        {"name": name, "path": str(found.path), "fingerprint": found.fingerprint}
        for name, found in checkpoints.items()
    ]

    def through(first: float, second: list[float]) -> Recipe:
        weights = zip(plain, (first, second), strict=True)
        inner = {
            "method": "linear",
            "sources": [{**source, "parameters": {"weight": weight}} for source, weight in weights],
        }
        source = {"name": "m", "path": "merged", "recipe": inner}
        return parse_recipe({"method": "passthrough", "sources": [source], "path": ["m 0-2"]}, "r")

    live = live_of(checkpoints)
    good = through(1.0, [0.5, 0.5])
    live.apply(good)
    before = logits(live.model)
    with pytest.raises(CandidateError):
        live.apply(through(1.0, [0.9, -1.0]))  # the weights of the last layer sum to zero
    live.apply(good)
    assert same_bits(logits(live.model), before)


def test_a_source_may_be_a_recipe_and_that_may_have_a_path(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, "llama")
    plain = [
        {"name": name, "path": str(found.path), "fingerprint": found.fingerprint}
        for name, found in checkpoints.items()
    ]
    inner: dict[str, Any] = {"method": "slerp", "sources": plain, "parameters": {"t": 0.4}}
    flowing = {"method": "passthrough", "sources": plain, "path": ["a 0", "b 2 -0.5", "a 1-2"]}
    live = live_of(checkpoints)
    for number, nested in enumerate((inner, {**inner, "parameters": {"t": 0.7}}, flowing)):
        sources = [{"name": "m", "path": "merged", "recipe": nested}, plain[1]]
        recipe = parse_recipe(
            {"method": "passthrough", "sources": sources, "path": ["m 0-1", "b 1 0.8", "m 2"]}, "r"
        )
        live.apply(recipe)
        found = open_sources(recipe)
        written = write_model(recipe, found, tmp_path / f"out{number}")
        assert_near(logits(live.model), logits(AutoModelForCausalLM.from_pretrained(written)), 1e-5)
        # The same in two steps, through files.
        made = parse_recipe(nested, "inner")
        folder = write_model(made, checkpoints, tmp_path / f"inner{number}")
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(found["m"].tensor(name), tensor)
        assert layout_of(found["m"]).num_layers == (4 if nested is flowing else 3)
        assert found["m"].fingerprint == made.digest
