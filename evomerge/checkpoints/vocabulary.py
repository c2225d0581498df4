"""The vocabulary of a merged model: its tokens, ids and files, and what configs say of it. No torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.files import broken, inside, read_json
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.templates import chosen_template
from evomerge.checkpoints.tokenizer import (
    VOCABULARY_FILES,
    added_tokens,
    extended,
    tokenizer_files,
    vocabulary,
)
from evomerge.errors import RecipeError
from evomerge.recipe import UNION, Recipe

if TYPE_CHECKING:
    from evomerge.checkpoints.writer import Writer

_IDS = re.compile(r"_token_ids?$|_token_index$|suppress_tokens$|^(bad|force)_words_ids$")
"""Keys of a config whose values are ids of tokens."""
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class TargetVocabulary:
    """What becomes which id in the merged model.

    Attributes:
        origin: The checkpoint whose tokenizer, with its ids, it begins with.
        rows: Rows of embedding and head; None: nothing is aligned, and they stay as they are.
        tokens: Token to id; empty where nothing is aligned.
        sources: Source name to its own token to row, without tokens that its embedding has no row for; empty
            where nothing is aligned.
        tokenizer_json: Content of `tokenizer.json` if tokens were added to the origin's.
        chat_template: The Jinja text to write; None: the tokenizer's own.
        warnings: One line for each thing that is allowed but may hurt.
    """

    origin: Checkpoint
    rows: int | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tokenizer_json: str | None = None
    chat_template: str | None = None
    warnings: tuple[str, ...] = ()

    def files(self) -> dict[str, Path | str]:
        """Return the tokenizer's files: name to the file to copy, or to the text to write."""
        files: dict[str, Path | str] = {path.name: path for path in tokenizer_files(self.origin.path)}
        if self.tokenizer_json is not None:
            # The other vocabulary files do not have the added tokens.
            files = {name: file for name, file in files.items() if name not in VOCABULARY_FILES}
            files["tokenizer.json"] = self.tokenizer_json
        if self.chat_template is not None:
            files = {name: file for name, file in files.items() if name not in _TEMPLATE_FILES}
            files["chat_template.jinja"] = self.chat_template
            if "tokenizer_config.json" in files:
                data = read_json(inside(self.origin.path, "tokenizer_config.json"))
                data.pop("chat_template", None)
                files["tokenizer_config.json"] = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        return files

    def write(self, writer: Writer) -> None:
        """Write the tokenizer's files into a writer's folder.

        Raises:
            UserError: A file cannot be written.
        """
        for name, file in self.files().items():
            if isinstance(file, Path):
                writer.copy_file(file)
            else:
                writer.add_text(name, file)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing folder, to load it from there."""
        for name, file in self.files().items():
            if isinstance(file, Path):
                shutil.copyfile(file, folder / name)
            else:
                (folder / name).write_text(file, "utf-8")

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model config with this vocabulary's size, and ids of special tokens as in the origin's.

        Args:
            config: Of any of the sources; what lies in its `text_config` is changed there.
        """
        result = self._with_ids(config, self.origin.config)
        inner, other = result.get("text_config"), self.origin.config.get("text_config")
        if isinstance(inner, dict):
            result["text_config"] = self._with_ids(inner, other if isinstance(other, dict) else {})
        return result

    def generation_config(self, reference: Checkpoint) -> dict[str, Any] | None:
        """Return the generation config of a model with this vocabulary; None if it needs none.

        Args:
            reference: The checkpoint that gives all of it but the ids of special tokens, which are those that
                the origin generates with.

        Raises:
            SourceError: A checkpoint's generation config cannot be read.
        """
        found = _generation(reference)
        if reference.path == self.origin.path:
            return found
        kept = {key: value for key, value in (found or {}).items() if not _IDS.search(key)}
        own = _generation(self.origin) or self.origin.text_config
        return {**kept, **{key: value for key, value in own.items() if _IDS.search(key)}} or None

    def _with_ids(self, config: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
        result = {key: value for key, value in config.items() if not _IDS.search(key)}
        result |= {key: value for key, value in origin.items() if _IDS.search(key)}
        if self.rows is not None and "vocab_size" in result:
            result["vocab_size"] = self.rows
        return result


def target_vocabulary(
    checkpoints: Mapping[str, Checkpoint], rows: Mapping[str, int], recipe: Recipe
) -> TargetVocabulary:
    """Return the vocabulary of a recipe's model.

    A named source's tokenizer is taken as it is. A union begins with that of the base, or of the first source
    where there is no base, and adds what the other sources have besides, by source and id. It can only add
    them as *added tokens*: their rows are merged like any others, but they are cut out of the text wherever
    it has them literally, before the tokenizer's own rules see it. That is right for whole markers such as
    `<|im_start|>`. Of another byte-pair encoding's pieces, plain ones (`ain`) then cut words that the first
    tokenizer would have kept whole, and marked ones (`Ġowl`) never occur; name one source instead.

    Args:
        checkpoints: Source name to checkpoint, for every source of the recipe.
        rows: Source name to the rows of its embedding. Rows behind the last token are padding and belong to
            no token; tokens behind the last row have none.
        recipe: With the wishes for the tokenizer.

    Raises:
        RecipeError: The chat template is unknown, or the source to take the tokenizer from has none.
        SourceError: A source's vocabulary differs and cannot be read.
    """
    used = {ref.name: checkpoints[ref.name] for ref in recipe.refs}
    template = chosen_template(recipe.chat_template, [checkpoint.path for checkpoint in used.values()])
    first = _first(used, recipe)
    origin = used[first]
    if recipe.tokenizer is None or not _differ(used, rows, recipe):
        return TargetVocabulary(origin, chat_template=template)
    own = _own_tokens(used, rows, first)
    tokens = vocabulary(origin.path) or {}
    added = [added_tokens(checkpoint.path) for checkpoint in used.values()]
    settings = {token: known[token] for known in reversed(added) for token in known}
    missing = _missing(own, tokens) if recipe.tokenizer == UNION else {}
    warnings = [_warning(name, sum(t not in settings for t in lacking)) for name, lacking in missing.items()]
    wanted = [token for found in (*missing.values(), recipe.tokens) for token in found]
    new = {token: settings.get(token, {}) for token in wanted if token not in tokens}
    text = None
    if new:
        text, tokens = extended(origin.path, new)
    size = max(tokens.values(), default=-1) + 1
    size += -size % (recipe.pad_to_multiple_of or 1)
    return TargetVocabulary(origin, size, tokens, own, text, template, tuple(filter(None, warnings)))


def _first(used: Mapping[str, Checkpoint], recipe: Recipe) -> str:
    """Return the source whose tokenizer the model's begins with."""
    having = [name for name, checkpoint in used.items() if checkpoint.tokenizer_fingerprint]
    if recipe.tokenizer in (None, UNION):
        first = recipe.reference.name
        return having[0] if having and first not in having else first
    if recipe.tokenizer not in having:
        problem = f'"{recipe.tokenizer}" has no tokenizer'
        raise RecipeError(f"tokenizer: {problem}; expected one of {', '.join(having)}")
    return recipe.tokenizer


def _missing(own: Mapping[str, Mapping[str, int]], tokens: Mapping[str, int]) -> dict[str, list[str]]:
    """Return each source's tokens that neither `tokens` nor a source before it has, by id."""
    found = set(tokens)
    missing = {}
    for name, known in own.items():
        missing[name] = sorted(known.keys() - found, key=known.__getitem__)
        found |= known.keys()
    return missing


def _warning(name: str, ordinary: int) -> str:
    if not ordinary:
        return ""
    return (
        f'tokenizer: union: {ordinary:,} ordinary tokens of "{name}" become added tokens, which are cut out '
        "of the text before the tokenizer's own rules apply; naming one source as tokenizer may serve better"
    )


def _differ(checkpoints: Mapping[str, Checkpoint], rows: Mapping[str, int], recipe: Recipe) -> bool:
    """Return whether anything is to be aligned."""
    prints = {checkpoint.tokenizer_fingerprint for checkpoint in checkpoints.values()} - {""}
    return bool(len(prints) > 1 or len(set(rows.values())) > 1 or recipe.tokens or recipe.pad_to_multiple_of)


def _own_tokens(
    checkpoints: Mapping[str, Checkpoint], rows: Mapping[str, int], first: str
) -> dict[str, dict[str, int]]:
    """Return each source's tokens that its embedding has a row for; without tokenizer those of `first`."""
    own = {}
    for name, checkpoint in checkpoints.items():
        giver = checkpoint if checkpoint.tokenizer_fingerprint else checkpoints[first]
        tokens = vocabulary(giver.path)
        if tokens is None:
            raise broken(
                giver.path,
                "has no tokenizer.json, which aligning vocabularies needs; make it with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        own[name] = {token: number for token, number in tokens.items() if number < rows[name]}
    return own


def _generation(checkpoint: Checkpoint) -> dict[str, Any] | None:
    file = checkpoint.path / "generation_config.json"
    return read_json(inside(checkpoint.path, file.name)) if file.is_file() else None
