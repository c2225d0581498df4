"""Tokenizer files of a checkpoint: which they are, what vocabulary they hold, adding tokens. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.files import broken, inside, read_json, show

VOCABULARY_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files that decide which text becomes which ids."""
_OTHER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model.v3", "tokenization_config.json"),
)
_MAX_TOKENIZER = 64 * 2**20
_MOST_VALUES = 4_000_000  # the largest vocabularies, of 262,144 tokens, have half as many
_MAX_ID = 2**24 - 1
_EXPECTED = "expected model.vocab and added_tokens as the tokenizers library writes them"
_SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer files in a checkpoint folder (resolved), by name; it may have none.

    Raises:
        SourceError: One of them is a symlink out of the folder, or no regular file.
    """
    names = [name for name in (*VOCABULARY_FILES, *_OTHER_FILES) if os.path.lexists(folder / name)]
    found = [inside(folder, name) for name in sorted(names)]
    for path in found:
        if not path.is_file():
            raise broken(path, "not a regular file")
    return found


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id of `tokenizer.json`, added tokens included; None if there is no such file.

    Raises:
        SourceError: The file is broken, or of a kind that is not known.
    """
    data = _tokenizer_json(folder)
    try:
        return None if data is None else _vocabulary(data)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise broken(folder / "tokenizer.json", _EXPECTED) from None


def added_tokens(folder: Path) -> dict[str, dict[str, bool]]:
    """Return the tokens that `tokenizer.json` lists beside its model, with their settings.

    The settings are those of `tokenizers.AddedToken`: `special`, `normalized`, `lstrip`, `rstrip` and
    `single_word`.

    Raises:
        SourceError: The file is broken.
    """
    data = _tokenizer_json(folder) or {}
    try:
        return {
            str(entry["content"]): {key: bool(entry[key]) for key in _SETTINGS if key in entry}
            for entry in data.get("added_tokens") or ()
        }
    except (TypeError, ValueError, KeyError, AttributeError):
        raise broken(folder / "tokenizer.json", _EXPECTED) from None


def extended(folder: Path, tokens: Mapping[str, Mapping[str, bool]]) -> tuple[str, dict[str, int]]:
    """Return a folder's `tokenizer.json` with more tokens, and the vocabulary it then has.

    They become added tokens with ids behind the others, in their order: they are found in the text as they
    are written, before the tokenizer's own rules (such as the merges of a byte-pair encoding) see it.

    Args:
        folder: With a `tokenizer.json`.
        tokens: Token to its settings, as `added_tokens` gives them; left out: those of an ordinary token.

    Raises:
        SourceError: The library cannot read the file, or its ids have gaps, which new tokens would fill.
    """
    from tokenizers import AddedToken, Tokenizer

    path = inside(folder, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise broken(path, f"the tokenizers library cannot read it ({show(str(error))})") from None
    before: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    try:
        tokenizer.add_tokens([AddedToken(token, **settings) for token, settings in tokens.items()])
    except Exception as error:
        raise broken(path, f"the tokenizers library cannot add tokens to it ({show(str(error))})") from None
    after: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    taken = {number: token for token, number in before.items()}
    for token in tokens:
        if taken.setdefault(after.get(token, -1), token) != token:
            problem = f"its ids have gaps, so {show(token)} would get an id that is in use"
            raise broken(path, f"{problem}; take another source's tokenizer")
    return tokenizer.to_str(pretty=True) + "\n", after


def _tokenizer_json(folder: Path) -> dict[str, Any] | None:
    path = folder / "tokenizer.json"
    return read_json(inside(folder, path.name), _MAX_TOKENIZER, _MOST_VALUES) if path.is_file() else None


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, log probability], the id is the position
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    tokens = {str(token): number for token, number in vocab.items()}
    for added in data.get("added_tokens") or ():
        tokens[str(added["content"])] = added["id"]
    if not all(type(number) is int and 0 <= number <= _MAX_ID for number in tokens.values()):
        raise ValueError
    return tokens
