"""Roles, layers and depths of every family; which checkpoints fit together."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints.layout import check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import SourceError
from tests.checkpoints.tiny import FAMILIES, edit_json, make_llama, make_model, make_tokenizer

# attention, mlp and norm tensors of one layer
PER_LAYER = {
    **{"llama": (4, 3, 2), "mistral": (4, 3, 2), "qwen2": (7, 3, 2), "qwen3": (6, 3, 2)},
    **{"gemma2": (4, 3, 4), "gemma3_text": (6, 3, 4), "phi3": (2, 2, 2), "gpt_neox": (4, 4, 4)},
    **{"olmo2": (6, 3, 2), "mixtral": (4, 7, 2), "qwen2_moe": (7, 11, 2), "qwen3_moe": (6, 7, 2)},
}
TIED = {"gemma2", "gemma3_text"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_of_a_family_has_its_place(model_type: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model(tmp_path / "model", model_type, layers=3))
    layout = layout_of(checkpoint)
    assert list(layout.places) == list(checkpoint.tensors)
    assert layout.family != "generic"
    assert layout.num_layers == 3
    assert layout.tied == (model_type in TIED)
    counts = Counter((place.layer, place.role) for place in layout.places.values())
    attention, mlp, norm = PER_LAYER[model_type]
    for layer in range(3):
        assert counts.pop((layer, "attention")) == attention
        assert counts.pop((layer, "mlp")) == mlp
        assert counts.pop((layer, "norm")) == norm
    final = 2 if model_type == "gpt_neox" else 1  # weight and bias
    head = {} if layout.tied else {(None, "head"): 1}
    assert counts == {(None, "norm"): final, (None, "embedding"): 1, **head}
    for place in layout.places.values():
        behind = 1.0 if place.role in ("norm", "head") else 0.0
        assert place.depth == (behind if place.layer is None else place.layer / 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_filters_in_order_give_the_roles(model_type: str, tmp_path: Path) -> None:
    """What a mergekit file can say, the first filter that is in the name, finds every role."""
    layout = layout_of(Checkpoint.open(make_model(tmp_path / "model", model_type)))
    ordered = [(part, role) for role in layout.roles() for part in layout.filters(role)]
    for name, place in layout.places.items():
        assert next(role for part, role in ordered if part in name) == place.role


def test_multimodal_model_is_placed_by_its_text_part(tmp_path: Path) -> None:
    text = {
        **{
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
        },
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14}}
    checkpoint = Checkpoint.open(make_model(tmp_path / "model", "gemma3", config=config))
    layout = layout_of(checkpoint)
    counts = Counter((place.layer, place.role) for place in layout.places.values())
    assert [counts[layer, "attention"] for layer in (0, 1)] == [6, 6]
    assert all(place.role == "other" for name, place in layout.places.items() if "vision" in name)
    assert layout.tied


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "starcoder2", "gptj"])
def test_unknown_family_is_guessed(model_type: str, tmp_path: Path) -> None:
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 32, "n_inner": 32, "rotary_dim": 4}
    layout = layout_of(Checkpoint.open(make_model(tmp_path / "model", model_type, config=sizes)))
    assert layout.family == "generic"
    assert layout.num_layers == 2
    counts = Counter((place.layer, place.role) for place in layout.places.values())
    for layer in (0, 1):
        for role in ("attention", "mlp", "norm"):
            assert counts[layer, role] > 0
        assert counts[layer, "other"] == 0
    assert counts[None, "embedding"] >= 1


def test_one_layer_has_depth_zero(tmp_path: Path) -> None:
    layout = layout_of(Checkpoint.open(make_llama(tmp_path / "model", layers=1)))
    assert {place.depth for place in layout.places.values() if place.layer == 0} == {0.0}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 1}, "layer 1"),
        ({"num_hidden_layers": 3}, "no tensor of layer 2"),
        ({"num_hidden_layers": "2"}, "positive integer"),
        ({"num_hidden_layers": None}, "positive integer"),
        ({"model_type": "gpt_neox"}, "no tensor of layer 0"),
    ],
)
def test_config_that_does_not_fit_the_weights_is_refused(
    tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    folder = make_llama(tmp_path / "model")
    edit_json(folder / "config.json", **change)
    with pytest.raises(SourceError, match=part):
        layout_of(Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("names", "model_type", "part"),
    [
        (["lm_head.weight"], "llama", "tie_word_embeddings is false"),
        (["model.embed_tokens.weight"], "llama", "no embedding"),
        (["model.layers."], "new", "no numbered layers"),
    ],
)
def test_missing_ends_are_refused(tmp_path: Path, names: list[str], model_type: str, part: str) -> None:
    folder = make_llama(tmp_path / "model")
    edit_json(folder / "config.json", model_type=model_type)
    drop(folder, *names)
    with pytest.raises(SourceError, match=part):
        layout_of(Checkpoint.open(folder))


def drop(folder: Path, *prefixes: str) -> None:
    checkpoint = Checkpoint.open(folder)
    kept = {name: checkpoint.tensor(name) for name in checkpoint.tensors if not name.startswith(prefixes)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


# Fitting together


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("base") / "model")


def compare(*folders: Path) -> list[str]:
    return check_compatible({f"m{number}": Checkpoint.open(folder) for number, folder in enumerate(folders)})


def refused(*folders: Path) -> str:
    with pytest.raises(SourceError) as caught:
        compare(*folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_siblings_fit(base: Path, tmp_path: Path) -> None:
    assert compare(base) == []
    assert compare(base, make_llama(tmp_path / "b", 1), make_llama(tmp_path / "c", 2)) == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', but 'llama' in \"m0\""),
        ({"hidden": 32}, "hidden_size is 32"),
        ({"layers": 3}, "num_hidden_layers is 3"),
        ({"config": {"num_attention_heads": 4}}, "num_attention_heads is 4"),
        ({"config": {"num_key_value_heads": 2}}, "num_key_value_heads is 2"),
        ({"config": {"head_dim": 16}}, "head_dim is 16"),
        ({"config": {"intermediate_size": 40}}, "intermediate_size is 40"),
        ({"config": {"tie_word_embeddings": True}}, "tie_word_embeddings is True"),
        ({"vocab": 60}, "the vocabulary differs"),
        ({"vocab": 60, "tokenizer": False}, "vocab_size is 60"),
        ({"config": {"attention_bias": True}}, "is only here"),
    ],
)
def test_other_shapes_are_refused(base: Path, tmp_path: Path, settings: dict[str, Any], part: str) -> None:
    other = make_model(tmp_path / "other", **{"seed": 1, **settings})
    assert part in refused(base, other)


def test_first_five_differing_tensors_are_named(base: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", 1)
    drop(other, "model.layers.1.")
    message = refused(base, other)
    assert message.count("is missing") == 5
    assert "and 4 more" in message
    full = Checkpoint.open(base)
    tensors = {name: full.tensor(name) for name in full.tensors}
    tensors["model.norm.weight"] = torch.ones(15)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert '"model.norm.weight" is [15] instead of [16]' in refused(base, other)


def test_other_vocabulary_names_tokens(base: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", 1)
    make_tokenizer(other, extra=("<x>", "<y>", "<z>", "<w>"))
    message = refused(base, other)
    assert "8 tokens are not as in" in message
    assert message.count(" instead of ") == 3


def test_missing_tokenizers(base: Path, tmp_path: Path) -> None:
    without = make_llama(tmp_path / "without", 1, tokenizer=False)
    assert ["no tokenizer" in line for line in compare(base, without)] == [True]
    assert ["no tokenizer" in line for line in compare(without, base)] == [True]
    other = make_llama(tmp_path / "other", 2, tokenizer=False)
    assert "no source has a tokenizer" in refused(without, other)
    make_tokenizer(other, extra=("<x>",))
    assert "the vocabulary differs" in refused(without, base, other)


def test_vocabularies_without_tokenizer_json(base: Path, tmp_path: Path) -> None:
    a, b = (make_llama(tmp_path / name, seed, tokenizer=False) for name, seed in (("a", 1), ("b", 2)))
    (a / "tokenizer.model").write_bytes(b"1")
    (b / "tokenizer.model").write_bytes(b"1")
    assert compare(a, b) == []
    (b / "tokenizer.model").write_bytes(b"2")
    assert "other vocabulary files" in refused(a, b)
    assert ["not compared" in line for line in compare(base, a)] == [True]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    other = make_llama(tmp_path / "other", 1)
    checkpoint = Checkpoint.open(other)
    tensors = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.tensors}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert "quantised" in refused(base, other)


def test_quantised_config_is_refused(base: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", 1)
    edit_json(other / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantised" in refused(base, other)


def test_same_checkpoint_twice_is_refused(base: Path, tmp_path: Path) -> None:
    assert "same checkpoint" in refused(base, base)
    (tmp_path / "link").symlink_to(base)
    assert "same checkpoint" in refused(base, tmp_path / "link")
    shutil.copytree(base, tmp_path / "copy")
    assert "same checkpoint" in refused(base, make_llama(tmp_path / "c", 1), tmp_path / "copy")


def test_softer_differences_are_warnings(base: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", 1, dtype=torch.bfloat16)
    edit_json(other / "config.json", rms_norm_eps=1e-5, rope_parameters={"rope_theta": 5e5})
    warnings = compare(base, other)
    assert len(warnings) == 3
    for line, what in zip(warnings, ("rope", "rms_norm_eps", "stored dtype"), strict=True):
        assert line.startswith(what)


def test_rope_of_either_transformers_version_is_the_same(base: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", 1)
    edit_json(other / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert compare(base, other) == []


def test_tied_models_fit_with_and_without_a_stored_head(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    a, b = (make_llama(tmp_path / name, seed, config=tied) for name, seed in (("a", 1), ("b", 2)))
    checkpoint = Checkpoint.open(b)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    assert compare(a, b) == compare(b, a) == []
    for folder in (a, b):
        layout = layout_of(Checkpoint.open(folder))
        assert layout.tied
        assert "head" not in layout.roles()
