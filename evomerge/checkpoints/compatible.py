"""Whether checkpoints can be merged with each other, decided before any weight is read. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from evomerge.checkpoints.files import broken, show
from evomerge.checkpoints.source import Checkpoint, TensorInfo
from evomerge.checkpoints.tokenizer import vocabulary
from evomerge.errors import SourceError

_SHAPE_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings"),
)
_WARNED_KEYS = (
    *("rms_norm_eps", "layer_norm_eps", "hidden_act", "hidden_activation", "sliding_window"),
    *("max_position_embeddings", "layer_types", "num_experts_per_tok"),
)
_ALIGN = "write tokenizer: union or tokenizer: NAME, a source's name, to align them by token"
_Named = tuple[str, Checkpoint]
_FLOATS = ("F32", "F16", "BF16", "F64")


def check_compatible(
    checkpoints: Mapping[str, Checkpoint], *, aligning: bool = False, sliced: bool = False
) -> list[str]:
    """Check that checkpoints fit together, each against the first one.

    Headers, configs and tokenizers come first; the content is hashed only when all of those fit.

    Args:
        checkpoints: Name (as messages give it) to checkpoint.
        aligning: Whether their vocabularies will be aligned (`aligned.align`) and may differ in tokens and in
            rows of embedding and head.
        sliced: Whether a recipe picks their layers: their numbers of layers may differ, and one may be there
            under several names.

    Returns:
        One line for each difference that is allowed but may hurt: rope, norm epsilon, stored dtype, ...

    Raises:
        SourceError: They differ in architecture, shapes or vocabulary, hold quantised weights, or two are
            the same checkpoint.
    """
    items = list(checkpoints.items())
    warnings: list[str] = []
    free = [key for key, may in (("vocab_size", aligning), ("num_hidden_layers", sliced)) if may]
    for name, checkpoint in items:
        _check_floats(name, checkpoint)
    for name, checkpoint in items[1:]:
        _check_architecture(items[0], (name, checkpoint))
    warnings += _check_vocabularies(items, aligning)
    for name, checkpoint in items[1:]:
        _check_keys(items[0], (name, checkpoint), free)
        _check_tensors(items[0], (name, checkpoint), aligning, sliced)
        warnings += _differences(items[0], (name, checkpoint))
    if items and not any(checkpoint.tokenizer_fingerprint for _, checkpoint in items):
        raise SourceError(
            "no source has a tokenizer; put tokenizer.json into the folder of at least one of them"
        )
    if not sliced:
        _check_distinct(items)
    return warnings


def _check_floats(name: str, checkpoint: Checkpoint) -> None:
    if "quantization_config" in checkpoint.text_config:
        raise broken(name, "quantised weights cannot be merged; take the checkpoint they were made from")
    for info in checkpoint.tensors.values():
        if info.dtype not in _FLOATS:
            problem = f'tensor "{info.name}" is stored as {info.dtype}, expected {", ".join(_FLOATS)}'
            raise broken(name, f"{problem}; quantised and integer weights cannot be merged")


def _check_architecture(first: _Named, other: _Named) -> None:
    expected, got = (checkpoint.config["model_type"] for _, checkpoint in (first, other))
    if expected != got:
        raise broken(other[0], f'model_type is {show(got)}, but {show(expected)} in "{first[0]}"')


def _check_keys(first: _Named, other: _Named, free: Collection[str]) -> None:
    expected, got = (checkpoint.text_config for _, checkpoint in (first, other))
    for key in _SHAPE_KEYS:
        if key in free:
            continue
        # A key that is left out has its default, which tensor shapes decide about.
        if expected.get(key) is not None and got.get(key) is not None and expected[key] != got[key]:
            problem = f'{key} is {show(got[key])}, but {show(expected[key])} in "{first[0]}"'
            hint = _ALIGN if key == "vocab_size" else "only models of one shape can be merged"
            raise broken(other[0], f"{problem}; {hint}")


def _check_tensors(first: _Named, other: _Named, aligning: bool, sliced: bool) -> None:
    expected, got = first[1].tensors, other[1].tensors
    if sliced:
        expected, got = _outside_layers(expected), _outside_layers(got)
    rows = [checkpoint.text_config.get("vocab_size") for _, checkpoint in (first, other)]
    differing = [f'"{name}" is missing' for name in sorted(expected.keys() - got.keys())]
    differing += [f'"{name}" is only here' for name in sorted(got.keys() - expected.keys())]
    differing += [
        f'"{name}" is {list(got[name].shape)} instead of {list(info.shape)}'
        for name, info in expected.items()
        if name in got and got[name].shape != info.shape
        if not (aligning and _by_token((info.shape, got[name].shape), rows))
    ]
    if differing:
        rest = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise broken(other[0], f'tensors differ from "{first[0]}": {", ".join(differing[:5])}{rest}')


def _outside_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if not re.search(r"\.\d+\.", name)}


def _by_token(shapes: Sequence[tuple[int, ...]], rows: Sequence[int | None]) -> bool:
    """Return whether tensors of these shapes have one row for each token, and rows of one shape."""
    indexed = all(shape[:1] == (count,) for shape, count in zip(shapes, rows, strict=True))
    return indexed and len({shape[1:] for shape in shapes}) == 1


def _check_vocabularies(items: list[_Named], aligning: bool) -> list[str]:
    """Return warnings about vocabularies that are missing or cannot be compared; raise for different ones."""
    having = [(name, checkpoint) for name, checkpoint in items if checkpoint.tokenizer_fingerprint]
    if items and not having:
        raise SourceError(
            "no source has a tokenizer; put tokenizer.json into the folder of at least one of them"
        )
    others = "the tokenizer that is written" if aligning else "the others"
    warnings = [
        f'"{name}" has no tokenizer; its vocabulary is taken to be that of {others}'
        for name, checkpoint in items
        if not checkpoint.tokenizer_fingerprint
    ]
    for other in having[1:] if not aligning else ():
        if other[1].tokenizer_fingerprint != having[0][1].tokenizer_fingerprint:
            warnings.append(_vocabulary_difference(having[0], other))
    return warnings


def _vocabulary_difference(first: _Named, other: _Named) -> str:
    """Return the warning that two vocabularies cannot be compared, or raise the error that they differ."""
    expected, got = (vocabulary(checkpoint.path) for _, checkpoint in (first, other))
    if expected is None and got is None:
        problem = f'the vocabulary differs: other vocabulary files than "{first[0]}"'
        raise broken(other[0], f"{problem}; {_ALIGN} (needs a tokenizer.json in each)")
    if expected is None or got is None:
        return f'vocabularies of "{first[0]}" and "{other[0]}" are in different formats and were not compared'
    pairs = sorted(expected.items() ^ got.items())
    tokens = list(dict.fromkeys(token for token, _ in pairs))
    examples = ", ".join(
        f"{show(token)} is {_number(got, token)} instead of {_number(expected, token)}"
        for token in tokens[:3]
    )
    problem = f'the vocabulary differs: {len(tokens)} tokens are not as in "{first[0]}" ({examples})'
    raise broken(other[0], f"{problem}; {_ALIGN}")


def _number(tokens: Mapping[str, int], token: str) -> str:
    return f"id {tokens[token]}" if token in tokens else "absent"


def _differences(first: _Named, other: _Named) -> list[str]:
    configs = [checkpoint.text_config for _, checkpoint in (first, other)]
    pairs: list[tuple[str, Any, Any]] = [("rope parameters", _rope(configs[0]), _rope(configs[1]))]
    for key in _WARNED_KEYS:
        if all(config.get(key) is not None for config in configs):
            pairs.append((key, configs[0][key], configs[1][key]))
    pairs.append(("stored dtype", first[1].torch_dtype, other[1].torch_dtype))
    return [
        f'{what} of "{other[0]}" ({show(got)}) differs from "{first[0]}" ({show(expected)})'
        for what, expected, got in pairs
        if expected != got
    ]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope settings in one form, whichever transformers version wrote them."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            rope |= config[key]
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
        del rope["type"]
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _check_distinct(items: list[_Named]) -> None:
    seen: dict[str, str] = {}
    for name, checkpoint in items:
        if seen.setdefault(checkpoint.fingerprint, name) != name:
            same = seen[checkpoint.fingerprint]
            raise broken(name, f'is the same checkpoint as "{same}"; give each source once')
