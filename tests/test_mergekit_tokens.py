"""Tokenizer, token embeddings and chat template in mergekit's files."""

import json

import pytest

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.errors import RecipeError
from evomerge.mergekit import from_mergekit
from evomerge.mergekit_writer import to_mergekit
from evomerge.recipe import ModelToken, ZeroRow
from tests.checkpoints.tiny import make_llama


def theirs(folder, **changes):
    models = [{"model": f"{folder}/{name}", "parameters": {"weight": 1.0}} for name in "ab"]
    return {"merge_method": "ties", "base_model": f"{folder}/base", "models": models, **changes}


TOKENS = {
    "<zero>": {"source": {"kind": "zero"}},
    "<own>": {"source": "FOLDER/b", "force": True},
    "<token>": {"source": {"kind": "model_token", "model": "FOLDER/a", "token": "</s>"}},
    "<number>": {
        "source": {"kind": "model_token", "model": {"model": {"path": "FOLDER/base"}}, "token_id": 3}
    },
}


def tokens(folder):
    return json.loads(json.dumps(TOKENS).replace("FOLDER", str(folder)))


@pytest.mark.parametrize(
    ("changes", "tokenizer"),
    [
        ({}, None),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "m/b"}, "b"),
        ({"tokenizer": {"source": "m/b"}}, "b"),
        ({"tokenizer": {"source": {"model": {"path": "m/b"}}}}, "b"),
        ({"tokenizer": {}}, "union"),
    ],
)
def test_the_tokenizer_is_that_of_a_model_or_the_union(changes, tokenizer):
    assert from_mergekit(theirs("m", **changes), "w").tokenizer == tokenizer


def test_tokens_padding_and_template_are_read():
    changes = {"tokenizer": {"source": "union", "tokens": tokens("m"), "pad_to_multiple_of": 32}}
    recipe = from_mergekit(theirs("m", chat_template="chatml", **changes), "w")
    assert recipe.chat_template == "chatml"
    assert recipe.pad_to_multiple_of == 32
    assert {token: (row.source, row.force) for token, row in recipe.tokens.items()} == {
        "<zero>": (ZeroRow(kind="zero"), False),
        "<own>": ("b", True),
        "<token>": (ModelToken(kind="model_token", model="a", token="</s>"), False),
        "<number>": (ModelToken(kind="model_token", model="base", token_id=3), False),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_source": "union"},
        {"tokenizer_source": "base", "chat_template": "auto"},
        {"tokenizer": {"source": "union", "tokens": TOKENS}},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 8}, "chat_template": "chatml"},
    ],
)
def test_what_is_read_is_written(tmp_path, changes):
    folder = make_llama(tmp_path / "base", layers=1, hidden=8).parent
    changes = json.loads(json.dumps(changes).replace("FOLDER", str(folder)))
    recipe = from_mergekit(theirs(folder, **changes), "w")
    written = to_mergekit(recipe, layout_of(Checkpoint.open(folder / "base")))
    again = from_mergekit(json.loads(json.dumps(written)), "w").model_copy(update={"dtype": recipe.dtype})
    assert again == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_source": "c"}, "tokenizer_source: c is none of the models"),
        ({"tokenizer_source": "base", "base_model": None}, 'tokenizer_source: "base" needs a base_model'),
        ({"tokenizer_source": "base", "tokenizer": {}}, "tokenizer_source: tokenizer is given too"),
        ({"tokenizer": "base"}, "tokenizer: expected a mapping with a source"),
        ({"tokenizer": {"token": {}}}, 'tokenizer: unknown key "token"; did you mean "tokens"?'),
        ({"tokenizer": {"tokens": {"x": "m/a"}}}, "tokenizer.tokens: expected a mapping of tokens"),
        ({"tokenizer": {"tokens": {"x": {"source": "c"}}}}, "tokenizer.tokens.'x'.source: c is none of the"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "tokens.x.source"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "tokens.x.source"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of: "),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, message):
    config = {**theirs("m"), "merge_method": "linear", **changes}
    config["parameters"] = {"weight": 1.0}
    with pytest.raises(RecipeError) as caught:
        from_mergekit({key: value for key, value in config.items() if value is not None}, "w.yaml")
    assert str(caught.value).startswith(f"w.yaml: {message}")
    assert "\n" not in str(caught.value)
