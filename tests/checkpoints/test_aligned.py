"""Embeddings and heads aligned by token: mergekit's rows, padding, slices, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints.aligned import AlignedCheckpoint, align
from evomerge.checkpoints.layout import check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.vocabulary import TargetVocabulary
from evomerge.errors import RecipeError, SourceError
from evomerge.merging.merger import Merger
from evomerge.recipe import Recipe, parse_recipe
from tests.checkpoints.mergekit_vocabulary import CASES, PADDING, TENSORS, make_sources, read
from tests.checkpoints.tiny import make_llama, make_model, make_tokenizer

EMBEDDING, HEAD = TENSORS.values()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def recipe_of(sources: dict[str, Path], base: str | None = None, **more: Any) -> Recipe:
    method = (
        {"method": "task_arithmetic", "base": {"name": base, "path": "x"}} if base else {"method": "linear"}
    )
    listed = [{"name": name, "path": str(path)} for name, path in sources.items() if name != base]
    return parse_recipe({**method, "sources": listed, **more}, "recipe")


def opened(sources: dict[str, Path]) -> dict[str, Checkpoint]:
    found = {name: Checkpoint.open(path) for name, path in sources.items()}
    check_compatible(found, aligning=True)
    return found


def aligned(sources: dict[str, Path], **recipe: Any) -> tuple[dict[str, Checkpoint], TargetVocabulary]:
    return align(opened(sources), recipe_of(sources, **recipe))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_mergekit(case: str, made: dict[str, Path]) -> None:
    config = CASES[case]
    base = config.get("base_model")
    data = {
        "method": config["merge_method"],
        "sources": [
            {"name": m["model"], "path": str(made[m["model"]]), "parameters": m["parameters"]}
            for m in config["models"]
        ],
        "parameters": config.get("parameters", {}),
        "tokenizer": config["tokenizer"]["source"],
        "tokens": config["tokenizer"].get("tokens", {}),
        "pad_to_multiple_of": config["tokenizer"].get("pad_to_multiple_of"),
        **({"base": {"name": base, "path": str(made[base])}} if base else {}),
    }
    recipe = parse_recipe(data, case)
    checkpoints, target = align(opened({ref.name: made[ref.name] for ref in recipe.refs}), recipe)
    merger = Merger(
        {ref.identity: checkpoints[ref.name] for ref in recipe.refs},
        layout_of(checkpoints[recipe.reference.name]),
        budget_bytes=0,
    )
    expected = read(case)
    found = {}
    for kind, name in TENSORS.items():
        rows = merger.merge(recipe, name).numpy()
        assert len(rows) == target.rows
        found |= {f"{kind}/{token}": rows[number] for token, number in target.tokens.items()}
        if len(rows) > len(target.tokens):
            found[f"{kind}/{PADDING}"] = rows[-1]
    assert found.keys() == expected.keys()
    for name, row in sorted(expected.items(), key=lambda item: PADDING in item[0]):
        np.testing.assert_allclose(found[name], row, atol=1e-6, err_msg=name)


def test_equal_vocabularies_cost_nothing(tmp_path: Path) -> None:
    sources = {name: make_llama(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    found = opened(sources)
    for tokenizer in ("union", "a", "b", None):
        checkpoints, target = align(found, recipe_of(sources, tokenizer=tokenizer))
        assert all(checkpoints[name] is found[name] for name in sources)
        assert target.rows is None
        assert target.config(found["a"].config) == found["a"].config


def test_a_source_that_has_the_target_vocabulary_is_left_alone(made: dict[str, Path]) -> None:
    found = opened(made)
    checkpoints, target = align(found, recipe_of(made, "base", tokenizer="base"))
    assert checkpoints["base"] is found["base"]
    assert isinstance(checkpoints["a"], AlignedCheckpoint)
    assert target.rows == 24


def test_the_order_in_which_a_file_lists_its_tokens_does_not_matter(tmp_path: Path) -> None:
    sources = {name: make_llama(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    make_tokenizer(sources["b"], 64, extra=("<x>",))
    before, _ = aligned(sources, tokenizer="a")
    file = sources["a"] / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    file.write_text(json.dumps(data), "utf-8")
    after, _ = aligned(sources, tokenizer="a")
    assert not isinstance(after["a"], AlignedCheckpoint)
    assert after["b"].tensor(HEAD).equal(before["b"].tensor(HEAD))


def test_an_aligned_checkpoint_is_one_like_any_other(made: dict[str, Path]) -> None:
    found = opened(made)
    checkpoints, target = align(found, recipe_of(made, "base", tokenizer="union"))
    for name, checkpoint in checkpoints.items():
        original = found[name]
        assert checkpoint.fingerprint == original.fingerprint
        assert checkpoint.text_config["vocab_size"] == target.rows == 29
        assert checkpoint.tensors.keys() == original.tensors.keys()
        again = pickle.loads(pickle.dumps(checkpoint))
        for tensor, info in checkpoint.tensors.items():
            value = checkpoint.tensor(tensor)
            assert tuple(value.shape) == info.shape
            assert value.nbytes == info.nbytes
            assert again.tensor(tensor).equal(value)
            indexed = tensor in (EMBEDDING, HEAD)
            assert checkpoint.is_stored(tensor) is not indexed
            if not indexed:
                assert value.equal(original.tensor(tensor))
        grown = 2 * 8 * (29 - original.tensors[HEAD].shape[0])
        assert checkpoint.num_parameters == original.num_parameters + grown
        assert checkpoint.nbytes == original.nbytes + 4 * grown
        assert layout_of(checkpoint).places == layout_of(original).places
        checkpoint.scan_finite()


def test_rows_keep_each_sources_dtype_whatever_the_threads(tmp_path: Path) -> None:
    sources = {
        "a": make_llama(tmp_path / "a", 1, dtype=torch.bfloat16),
        "b": make_llama(tmp_path / "b", 2, vocab=70),
    }
    make_tokenizer(sources["b"], 64, extra=("<x>", "<y>"))
    checkpoints, target = aligned(sources, tokenizer="union", pad_to_multiple_of=50)
    assert target.rows == 100
    assert target.tokens["<y>"] == 65
    a, b = (checkpoints[name].tensor(EMBEDDING) for name in sources)
    assert a.dtype == torch.bfloat16
    assert b.dtype == torch.float32
    original = Checkpoint.open(sources["b"]).tensor(EMBEDDING)
    assert b[65].equal(original[63])
    assert a[65].equal(original[63].bfloat16())
    assert b[66:].equal(b[:66].double().mean(0).float().expand(34, -1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert checkpoints["b"].tensor(EMBEDDING).equal(b)
    finally:
        torch.set_num_threads(threads)


def test_a_slice_gives_rows_from_the_sources_that_take_part(tmp_path: Path) -> None:
    extra = {"a": ("<x>",), "b": ("<x>", "<y>"), "c": ("<y>", "<z>")}
    sources = {name: make_llama(tmp_path / name, seed, layers=1) for seed, name in enumerate(extra)}
    for name, tokens in extra.items():
        make_tokenizer(sources[name], 64, tokens)
    slices = [{"layers": {"a": [0, 1], "c": [0, 1]}}, {"layers": {"b": [0, 1], "c": [0, 1]}}]
    checkpoints, target = aligned(sources, tokenizer="union", slices=slices)
    own = {name: Checkpoint.open(path) for name, path in sources.items()}
    rows = {name: {token: 64 - len(extra[name]) + i for i, token in enumerate(extra[name])} for name in extra}
    x, y = target.tokens["<x>"], target.tokens["<y>"]
    embedding, head = (checkpoints["c"].tensor(name) for name in (EMBEDDING, HEAD))
    assert embedding[x].equal(own["a"].tensor(EMBEDDING)[rows["a"]["<x>"]])
    assert head[x].equal(own["b"].tensor(HEAD)[rows["b"]["<x>"]])
    assert checkpoints["a"].tensor(EMBEDDING)[y].equal(own["c"].tensor(EMBEDDING)[rows["c"]["<y>"]])


def test_tokens_without_a_row_are_absent_and_get_one(tmp_path: Path) -> None:
    """As where a tokenizer has a padding token that was added without resizing the model."""
    sources = {name: make_llama(tmp_path / name, seed, vocab=60) for seed, name in enumerate(("a", "b"))}
    make_tokenizer(sources["a"], 62, extra=("<here>", "<nowhere>"))
    make_tokenizer(sources["b"], 60, extra=("<here>",))
    checkpoints, target = aligned(sources, tokenizer="a")
    assert target.rows == 62
    a, b = (checkpoints[name].tensor(HEAD) for name in sources)
    assert a[60].equal(b[60])
    assert b[60].equal(Checkpoint.open(sources["b"]).tensor(HEAD)[59])
    assert not a[61].any()


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "gpt_neox", "phi", "gpt2"])
def test_families(model_type: str, tmp_path: Path) -> None:
    """Biases of the head too, but not embeddings of positions."""
    config = {"tie_word_embeddings": model_type in ("gemma3_text", "gpt2"), "max_position_embeddings": 60}
    if model_type == "gpt2":
        config["n_positions"] = 60
    sources = {
        name: make_model(tmp_path / name, model_type, seed=seed, vocab=vocab, config=config)
        for name, seed, vocab in (("a", 0, 60), ("b", 1, 64))
    }
    checkpoints, target = aligned(sources, tokenizer="union")
    assert target.rows == 64
    shapes = [{name: info.shape for name, info in checkpoints[s].tensors.items()} for s in sources]
    assert shapes[0] == shapes[1]
    grown = {
        name for name, info in Checkpoint.open(sources["a"]).tensors.items() if info.shape != shapes[0][name]
    }
    expected = {
        "qwen2": {EMBEDDING, HEAD},
        "gemma3_text": {EMBEDDING},
        "gpt_neox": {"gpt_neox.embed_in.weight", "embed_out.weight"},
        "phi": {EMBEDDING, HEAD, "lm_head.bias"},
        "gpt2": {"transformer.wte.weight"},
    }
    assert grown == expected[model_type]


def test_a_source_without_tokenizer_has_the_vocabulary_of_the_first(tmp_path: Path) -> None:
    sources = {name: make_llama(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "c"))}
    make_tokenizer(sources["b"], 64, extra=("<x>",))
    for file in sources["c"].glob("token*"):
        file.unlink()
    checkpoints, target = aligned(sources, tokenizer="b")
    a, c = Checkpoint.open(sources["a"]), Checkpoint.open(sources["c"])
    assert checkpoints["c"].tensor(HEAD)[62].equal(c.tensor(HEAD)[62]) == (target.tokens["<x>"] != 62)
    assert checkpoints["a"].tensor(HEAD)[:63].equal(a.tensor(HEAD)[:63])


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ({"tokens": {"<a>": {"source": "b"}}}, "\"b\" has no token '<a>'"),
        ({"tokens": {"<n>": {"source": "b"}}}, "\"b\" has no token '<n>'"),
        (
            {"tokens": {"<n>": {"source": {"kind": "model_token", "model": "a", "token": "?"}}}},
            "no token '?'",
        ),
        ({"tokens": {"<n>": {"source": {"kind": "model_token", "model": "a", "token_id": 26}}}}, "below 26"),
        ({"chat_template": "chatlm"}, 'did you mean "chatml"'),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(
    recipe: dict[str, Any], part: str, made: dict[str, Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        aligned(made, tokenizer="union", **recipe)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabularies_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    sources = {name: make_llama(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}
    (sources["b"] / "tokenizer.json").rename(sources["b"] / "tokenizer.model")
    with pytest.raises(SourceError, match="has no tokenizer.json"):
        aligned(sources, tokenizer="union")
    (sources["b"] / "tokenizer.model").unlink()
    with pytest.raises(RecipeError, match='tokenizer: "b" has no tokenizer; expected one of a'):
        aligned(sources, tokenizer="b")


def test_an_embedding_of_other_rows_is_refused(tmp_path: Path) -> None:
    sources = {"a": make_llama(tmp_path / "a"), "b": make_llama(tmp_path / "b", 1, vocab=60)}
    tensors = {name: Checkpoint.open(sources["a"]).tensor(name).clone() for name in (EMBEDDING, HEAD)}
    checkpoint = Checkpoint.open(sources["a"])
    rest = {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}
    save_file(
        {**rest, HEAD: tensors[HEAD][:50].clone()}, sources["a"] / "model.safetensors", {"format": "pt"}
    )
    found = {name: Checkpoint.open(path) for name, path in sources.items()}
    with pytest.raises(SourceError, match="expected 64 rows, one per token"):
        align(found, recipe_of(sources, tokenizer="union"))


def test_fitting_together_when_aligned(tmp_path: Path) -> None:
    found = {
        "a": Checkpoint.open(make_llama(tmp_path / "a")),
        "b": Checkpoint.open(make_llama(tmp_path / "b", 1, vocab=60)),
        "c": Checkpoint.open(make_llama(tmp_path / "c", 2, vocab=60, hidden=32)),
    }
    two = {name: found[name] for name in ("a", "b")}
    assert check_compatible(two, aligning=True) == []
    with pytest.raises(SourceError, match="write tokenizer: union or tokenizer: NAME"):
        check_compatible(two)
    with pytest.raises(SourceError, match="hidden_size is 32"):
        check_compatible(found, aligning=True)
