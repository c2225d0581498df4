"""The merged model's tokenizer: its ids, its files, the special ids of its configs, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evomerge.checkpoints.aligned import align
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.templates import KNOWN
from evomerge.checkpoints.tokenizer import added_tokens, extended, tokenizer_files, vocabulary
from evomerge.checkpoints.vocabulary import TargetVocabulary
from evomerge.checkpoints.writer import Writer
from evomerge.errors import RecipeError, SourceError
from evomerge.merging.merger import Merger
from evomerge.recipe import Recipe, parse_recipe
from evomerge.strict import parse_yaml
from tests.checkpoints.tiny import edit_json, make_llama, make_model, make_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe_of(sources: dict[str, Path], **more: Any) -> Recipe:
    listed = [{"name": name, "path": str(path)} for name, path in sources.items()]
    return parse_recipe({"method": "linear", "sources": listed, **more}, "recipe")


def target_of(sources: dict[str, Path], **recipe: Any) -> TargetVocabulary:
    found = {name: Checkpoint.open(path) for name, path in sources.items()}
    return align(found, recipe_of(sources, **recipe))[1]


def make_chatml(path: Path, seed: int = 1) -> Path:
    """Make a model whose tokenizer has two special tokens more, and speaks ChatML."""
    make_llama(path, seed, vocab=66)
    tokenizer = AutoTokenizer.from_pretrained(make_plain(path))
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML)})
    tokenizer.chat_template = KNOWN["chatml"]
    tokenizer.save_pretrained(path)
    edit_json(path / "config.json", eos_token_id=65)
    edit_json(path / "generation_config.json", eos_token_id=[2, 65], temperature=0.5, do_sample=True)
    return path


def make_plain(path: Path) -> Path:
    make_tokenizer(path, 64)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {"plain": make_llama(tmp_path / "plain"), "chat": make_chatml(tmp_path / "chat")}


def loaded(target: TargetVocabulary, folder: Path) -> Any:
    folder.mkdir()
    target.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_union_keeps_the_first_ids_and_adds_tokens_as_they_were(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    target = target_of(sources, tokenizer="union")
    plain = vocabulary(sources["plain"])
    assert plain is not None
    assert target.tokens == {**plain, "<|im_start|>": 64, "<|im_end|>": 65}
    assert target.warnings == ()
    tokenizer = loaded(target, tmp_path / "out")
    assert tokenizer.get_vocab() == target.tokens
    ids = tokenizer.encode("<|im_start|>ab<|im_end|>", add_special_tokens=False)
    assert ids == [64, plain["a"], plain["b"], 65]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert added_tokens(tmp_path / "out")["<|im_end|>"]["special"] is True
    assert tokenizer.eos_token_id == 2


def test_the_other_way_round_it_is_the_larger_vocabulary(sources: dict[str, Path]) -> None:
    target = target_of(dict(reversed(sources.items())), tokenizer="union")
    assert target.tokens == vocabulary(sources["chat"])
    assert target.tokenizer_json is None


def test_a_named_tokenizer_is_copied_as_it_is(sources: dict[str, Path], tmp_path: Path) -> None:
    target = target_of(sources, tokenizer="chat")
    loaded(target, tmp_path / "out")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in tokenizer_files(sources["chat"])}
    with Writer(tmp_path / "written", []) as writer:
        target.write(writer)
        writer.commit()
    written = {file.name: file.read_bytes() for file in (tmp_path / "written").iterdir()}
    assert copied.items() <= written.items()


def test_new_tokens_are_added_to_either(sources: dict[str, Path], tmp_path: Path) -> None:
    row = {"source": {"kind": "model_token", "model": "plain", "token": "a"}}
    for number, tokenizer in enumerate(("plain", "chat", "union")):
        tokens = {"<|im_end|>": {"source": "chat"}, "<new>": row, "b": row}
        target = target_of(sources, tokenizer=tokenizer, tokens=tokens, pad_to_multiple_of=32)
        assert target.rows == 96
        assert target.tokens["<new>"] == len(target.tokens) - 1 == (65 if number == 0 else 66)
        assert added_tokens_of(target)["<|im_end|>"]["special"] is True
        assert added_tokens_of(target)["<new>"]["special"] is False
        found = loaded(target, tmp_path / str(number))
        assert found.encode("<new>", add_special_tokens=False) == [target.tokens["<new>"]]


def added_tokens_of(target: TargetVocabulary) -> dict[str, dict[str, bool]]:
    return {entry["content"]: entry for entry in json.loads(target.tokenizer_json or "{}")["added_tokens"]}


def make_bytes(path: Path, text: str) -> Path:
    """Give a model a byte-level BPE trained on a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["</s>"])
    core.train_from_iterator([text] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(path)
    return path


def test_a_union_of_other_merges_keeps_the_first_rules_and_says_so(tmp_path: Path) -> None:
    texts = {"a": "the house of the mouse", "b": "an owl and an otter again"}
    sources = {
        name: make_bytes(make_llama(tmp_path / name, seed, vocab=270, tokenizer=False), text)
        for seed, (name, text) in enumerate(texts.items())
    }
    target = target_of(sources, tokenizer="union")
    lacking = (vocabulary(sources["b"]) or {}).keys() - (vocabulary(sources["a"]) or {}).keys()
    assert target.rows == len(vocabulary(sources["a"]) or {}) + len(lacking)
    assert len(target.warnings) == 1
    assert f'{len(lacking)} ordinary tokens of "b" become added tokens' in target.warnings[0]
    first, union = AutoTokenizer.from_pretrained(sources["a"]), loaded(target, tmp_path / "out")
    text = "the mouse of the house"
    assert union.encode(text) == first.encode(text)
    assert "ain" in lacking
    assert union.encode("rain") == [*first.encode("r"), target.tokens["ain"]]
    spaced = next(token for token in sorted(lacking) if token.startswith("\u0120") and len(token) > 2)
    assert target.tokens[spaced] not in union.encode(" " + spaced[1:])


def test_old_vocabulary_files_do_not_come_along_with_a_larger_one(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("tokenizer.model", "added_tokens.json"):
        (sources["plain"] / name).write_text("{}")
    names = {file.name for file in tokenizer_files(sources["plain"])}
    assert set(target_of(sources, tokenizer="plain").files()) == names
    left = names - {"tokenizer.model", "added_tokens.json"}
    assert set(target_of(sources, tokenizer="union").files()) == left


def test_the_chosen_template_replaces_every_other(sources: dict[str, Path], tmp_path: Path) -> None:
    edit_json(sources["plain"] / "tokenizer_config.json", chat_template="old")
    (sources["plain"] / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert loaded(target_of(sources, tokenizer="plain"), tmp_path / "own").chat_template == "old"
    target = target_of(sources, tokenizer="plain", chat_template="llama3")
    tokenizer = loaded(target, tmp_path / "new")
    assert tokenizer.chat_template == KNOWN["llama3"]
    assert "old" not in "".join(file.read_text() for file in (tmp_path / "new").iterdir())
    kept = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    before = json.loads((sources["plain"] / "tokenizer_config.json").read_text())
    assert kept == {key: value for key, value in before.items() if key != "chat_template"}
    # Also where nothing is aligned.
    same = {"plain": sources["plain"]}
    assert target_of(same, chat_template="llama3").chat_template == KNOWN["llama3"]


def test_special_ids_follow_the_tokenizer(sources: dict[str, Path]) -> None:
    plain, chat = (Checkpoint.open(path) for path in sources.values())
    target = target_of(sources, tokenizer="chat")
    config = target.config(plain.config)
    assert (config["vocab_size"], config["eos_token_id"]) == (66, 65)
    assert target.config(config) == config
    generation = target.generation_config(plain)
    assert generation is not None
    assert generation["eos_token_id"] == [2, 65]
    assert "temperature" not in generation
    union = target_of(sources, tokenizer="union")
    assert union.config(plain.config) == {**plain.config, "vocab_size": 66}
    assert (union.generation_config(plain) or {})["eos_token_id"] == 2
    for file in ("plain", "chat"):
        (sources[file] / "generation_config.json").unlink()
    assert union.generation_config(plain) is None
    assert (target.generation_config(plain) or {})["eos_token_id"] == 65
    assert chat.config["eos_token_id"] == 65


def test_special_ids_follow_the_tokenizer_without_alignment_too(tmp_path: Path) -> None:
    """As of a base and its chat model, which ends its turns with another token of the same vocabulary."""
    sources = {name: make_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "chat"))}
    edit_json(sources["chat"] / "config.json", eos_token_id=7)
    config = Checkpoint.open(sources["base"]).config
    assert target_of(sources).config(config) == config
    assert target_of(sources, tokenizer="chat").config(config) == {**config, "eos_token_id": 7}


def test_multimodal_configs_are_changed_within(tmp_path: Path) -> None:
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
    sources = {
        name: make_model(
            tmp_path / name, "gemma3", seed=seed, config={**config, "image_token_index": 60 + seed}
        )
        for seed, name in enumerate(("a", "b"))
    }
    make_tokenizer(sources["b"], 64, extra=("<x>",))
    target = target_of(sources, tokenizer="b", pad_to_multiple_of=50)
    merged = target.config(Checkpoint.open(sources["a"]).config)
    assert merged["text_config"]["vocab_size"] == 100
    key = "image_token_index" if "image_token_index" in merged else "image_token_id"
    assert merged[key] == 61


def test_a_merged_model_is_loaded_with_its_tokenizer(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(sources, tokenizer="union", chat_template="auto", pad_to_multiple_of=8)
    checkpoints, target = align({name: Checkpoint.open(path) for name, path in sources.items()}, recipe)
    reference = checkpoints["plain"]
    merger = Merger({ref.identity: checkpoints[ref.name] for ref in recipe.refs}, layout_of(reference))
    plan = [(info.name, info.dtype, info.shape) for info in reference.tensors.values()]
    with Writer(tmp_path / "out", plan) as writer:
        for name in merger.outputs(recipe):
            writer.add(name, merger.merge(recipe, name))
        writer.add_json("config.json", target.config(reference.config))
        target.write(writer)
        writer.commit()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape == (72, 16)
    talk = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids[0, 0] == 64
    assert torch.isfinite(model(ids).logits).all()


def test_gaps_among_the_ids_are_refused_where_tokens_would_fall_onto_others(tmp_path: Path) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, "a"))
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SourceError, match="ids have gaps, so '<x>'"):
        extended(tmp_path, {"<x>": {}})
    core.add_special_tokens([AddedToken("<s>", special=True)])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="tokenizers library cannot read it"):
        extended(tmp_path, {"<x>": {}})


@pytest.mark.parametrize("number", [-1, 2**24])
def test_ids_that_no_embedding_has_are_refused(number: int, tmp_path: Path) -> None:
    data = {"model": {"vocab": {"a": 0, "b": number}}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(SourceError, match=r"expected model\.vocab"):
        vocabulary(tmp_path)


def test_wishes_for_the_vocabulary_are_part_of_the_recipe(sources: dict[str, Path]) -> None:
    row = {"source": "chat", "force": True}
    wishes: list[dict[str, Any]] = [
        {},
        {"tokenizer": "chat"},
        {"tokenizer": "union"},
        {"tokenizer": "union", "tokens": {"a": row, "b": {"source": {"kind": "zero"}}}},
        {"tokenizer": "union", "tokens": {"b": {"source": {"kind": "zero"}}, "a": row}},
        {"tokenizer": "union", "tokens": {"a": {"source": "chat"}}},
        {"tokenizer": "union", "tokens": {"a": {"source": "plain"}}},
        {"tokenizer": "union", "pad_to_multiple_of": 8},
        {"chat_template": "chatml"},
    ]
    recipes = [recipe_of(sources, **wish) for wish in wishes]
    assert len({recipe.digest for recipe in recipes}) == len(wishes)
    assert recipe_of(sources, tokenizer="plain").digest == recipes[0].digest
    for recipe in recipes:
        again = parse_recipe(parse_yaml(recipe.to_yaml(), "recipe", RecipeError), "recipe")
        assert again == recipe
        assert list(again.tokens) == list(recipe.tokens)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"tokens": {"a": {"source": "chat"}}}, "tokens: needs a tokenizer; write tokenizer: union or"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: needs a tokenizer"),
        ({"tokenizer": "x"}, 'tokenizer: "x" is none of plain, chat, union'),
        (
            {"tokenizer": "union", "tokens": {"a": {"source": "x"}}},
            "tokens.'a'.source: \"x\" is none of plain",
        ),
        ({"tokenizer": "union", "tokens": {"a": {"source": {"kind": "one"}}}}, "tokens.a.source"),
        (
            {"tokenizer": "union", "tokens": {"a": {"source": {"kind": "model_token", "model": "plain"}}}},
            "tokens.'a'.source: expected either token or token_id",
        ),
        ({"tokenizer": "union", "pad_to_multiple_of": 0}, "pad_to_multiple_of: expected at least 1"),
    ],
)
def test_wrong_wishes_are_refused_by_name(wish: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of({"plain": tmp_path, "chat": tmp_path}, **wish)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_called_union_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is also the name of a source"):
        recipe_of({"union": tmp_path, "b": tmp_path}, tokenizer="union")
    recipe = recipe_of({"union": tmp_path, "b": tmp_path / "b"})
    assert recipe.digest == recipe_of({"a": tmp_path, "b": tmp_path / "b"}).digest
