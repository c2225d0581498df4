"""Tokenizer files of a checkpoint: which they are, what vocabulary they hold, their copy. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.files import broken, inside, read_json

if TYPE_CHECKING:
    from evomerge.checkpoints.writer import Writer

VOCABULARY_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files that decide which text becomes which ids."""
_OTHER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model.v3", "tokenization_config.json"),
)
_MAX_TOKENIZER = 256 * 2**20


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer files in a checkpoint folder (resolved), by name; it may have none.

    Raises:
        SourceError: One of them is a symlink out of the folder.
    """
    names = [name for name in (*VOCABULARY_FILES, *_OTHER_FILES) if (folder / name).is_file()]
    return [inside(folder, name) for name in sorted(names)]


def copy_tokenizer(source: Path, writer: Writer) -> None:
    """Copy the tokenizer files of checkpoint folder `source`, and nothing else, into a writer's folder.

    Raises:
        SourceError: A file is a symlink out of the folder.
        UserError: A file cannot be written.
    """
    for path in tokenizer_files(source.resolve()):
        writer.copy_file(path)


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id of `tokenizer.json`, added tokens included; None if there is no such file.

    Raises:
        SourceError: The file is broken, or of a kind that is not known.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    data = read_json(inside(folder, path.name), _MAX_TOKENIZER)
    try:
        return _vocabulary(data)
    except (TypeError, ValueError, KeyError, AttributeError):
        expected = "expected model.vocab and added_tokens as the tokenizers library writes them"
        raise broken(path, expected) from None


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, log probability], the id is the position
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    tokens = {str(token): int(number) for token, number in vocab.items()}
    for added in data.get("added_tokens") or ():
        tokens[str(added["content"])] = int(added["id"])
    return tokens
