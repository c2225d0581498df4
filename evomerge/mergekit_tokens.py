"""Mergekit's keys for tokenizer, token embeddings and chat template. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evomerge.errors import RecipeError, nearest
from evomerge.mergekit_models import Key, model_key
from evomerge.recipe import UNION, ModelToken, Recipe, SourceRef, TokenRow, ZeroRow

KNOWN_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")


def read_tokenizer(
    data: Mapping[str, Any], names: Mapping[Key, str], base: Key | None, where: str
) -> dict[str, Any]:
    """Return the keys of a recipe for what a mergekit config says of tokenizer and chat template.

    Where it says nothing, mergekit takes config and tokenizer of the base model, which must be one of the
    models here.

    Args:
        data: The config.
        names: Model to name in the recipe.
        base: The base model.
        where: The file, for messages.
    """
    found: dict[str, Any] = {"chat_template": data.get("chat_template")}
    given, source = data.get("tokenizer"), data.get("tokenizer_source")
    if given is not None and source is not None:
        raise RecipeError(f"{where}: tokenizer_source: tokenizer is given too; leave one of them out")
    if given is not None:
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: tokenizer: expected a mapping with a source")
        for key in given:
            if key not in KNOWN_TOKENIZER:
                raise RecipeError(
                    f'{where}: tokenizer: unknown key "{key}"{nearest(str(key), KNOWN_TOKENIZER)}'
                )
        found["tokenizer"] = _source(given.get("source", UNION), names, base, f"{where}: tokenizer.source")
        found["tokens"] = _tokens(given.get("tokens") or {}, names, f"{where}: tokenizer.tokens")
        found["pad_to_multiple_of"] = given.get("pad_to_multiple_of")
    elif source is not None:
        found["tokenizer"] = _source(source, names, base, f"{where}: tokenizer_source")
    elif base is not None:
        _named(base, names, f"{where}: base_model")
    return found


def _source(given: Any, names: Mapping[Key, str], base: Key | None, where: str) -> str:
    if given == UNION:
        return UNION
    if given != "base":
        return _named(model_key(given, where), names, where)
    if base is None:
        raise RecipeError(f'{where}: "base" needs a base_model; name one of the models instead')
    return _named(base, names, where)


def _named(key: Key, names: Mapping[Key, str], where: str) -> str:
    if key not in names:
        raise RecipeError(f"{where}: {key[0]} is none of the models")
    return names[key]


def _tokens(given: Any, names: Mapping[Key, str], where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(row, dict) for row in given.values()):
        raise RecipeError(f"{where}: expected a mapping of tokens with a source each")
    return {str(token): _row(row, names, f"{where}.{token!a}") for token, row in given.items()}


def _row(given: dict[str, Any], names: Mapping[Key, str], where: str) -> dict[str, Any]:
    source = given.get("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "model_token":
        model = model_key(source.get("model"), f"{where}.source.model")
        source = {**source, "model": _named(model, names, f"{where}.source.model")}
    elif kind is None and source is not None:
        source = _named(model_key(source, f"{where}.source"), names, f"{where}.source")
    return {**given, "source": source}


def write_tokenizer(recipe: Recipe, written: Callable[[SourceRef], Any]) -> dict[str, Any]:
    """Return the keys of a mergekit config for a recipe's tokenizer and chat template.

    Args:
        recipe: The recipe.
        written: Returns a source as mergekit names it.
    """
    config: dict[str, Any] = {}
    by_name = {ref.name: written(ref) for ref in recipe.refs}
    if recipe.chat_template is not None:
        config["chat_template"] = recipe.chat_template
    if recipe.tokenizer is None:
        return config
    source = by_name.get(recipe.tokenizer, UNION)
    tokens = {token: _row_written(row, by_name) for token, row in recipe.tokens.items()}
    if tokens or recipe.pad_to_multiple_of:
        whole = {"source": source, "tokens": tokens, "pad_to_multiple_of": recipe.pad_to_multiple_of}
        return {**config, "tokenizer": {key: value for key, value in whole.items() if value}}
    return {**config, "tokenizer_source": source}


def _row_written(row: TokenRow, by_name: Mapping[str, Any]) -> dict[str, Any]:
    source: Any = row.source
    if isinstance(source, ZeroRow):
        source = {"kind": "zero"}
    elif isinstance(source, ModelToken):
        source = source.model_dump(exclude_none=True) | {"model": by_name[source.model]}
    else:
        source = by_name[source]
    return {"source": source, **({"force": True} if row.force else {})}
