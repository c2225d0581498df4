"""Recipe to files: every tensor is read, merged and written in turn; memory holds a few tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.layout import check_compatible, layout_of
from evomerge.checkpoints.source import Checkpoint, resolve
from evomerge.checkpoints.tokenizer import copy_tokenizer
from evomerge.checkpoints.writer import Writer, check_target
from evomerge.merging.merger import DTYPES, Merger
from evomerge.recipe import Recipe, SourceRef

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def open_sources(refs: Iterable[SourceRef], base_dir: Path | None = None) -> dict[str, Checkpoint]:
    """Open the checkpoints that a recipe names.

    Returns:
        Source name to checkpoint, in the order of `refs`.

    Raises:
        SourceError: One is missing or broken, or they do not fit together.
    """
    opened = {ref.name: Checkpoint.open(resolve(ref.path, ref.revision, base_dir=base_dir)) for ref in refs}
    if len(opened) > 1:
        check_compatible(opened)
    return opened


def write_model(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    target: Path,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the merged model as a Hugging Face directory, all or nothing.

    Args:
        recipe: What to merge.
        checkpoints: Source name to checkpoint, for every source of the recipe.
        target: The directory to make; it must not exist.
        texts: More files by name, such as a model card.
        progress: Called with bytes written and bytes in all.

    Returns:
        `target`.

    Raises:
        UserError: The target exists, cannot be written, or the disk is full.
    """
    check_target(target)
    by_identity = {ref.identity: checkpoints[ref.name] for ref in recipe.refs}
    reference = checkpoints[recipe.reference.name]
    layout = layout_of(reference)
    merger = Merger(by_identity, layout, budget_bytes=0)
    names = list(layout.places)
    infos = [reference.tensors[name] for name in names]
    dtypes = [
        SAFETENSORS_DTYPES[recipe.dtype] if recipe.dtype and _floating(i.dtype) else i.dtype for i in infos
    ]
    plan = [(name, dtype, info.shape) for name, dtype, info in zip(names, dtypes, infos, strict=True)]
    total, done = sum(info.nbytes for info in infos), 0
    with Writer(target, plan=plan) as writer:
        for name, info in zip(names, infos, strict=True):
            writer.add(name, merger.merge(recipe, name))
            done += info.nbytes
            progress(done, total)
        writer.add_json("config.json", merged_config(reference.config, recipe))
        generation = reference.path / "generation_config.json"
        if generation.is_file():
            writer.copy_file(generation)
        copy_tokenizer(checkpoints[recipe.tokenizer or recipe.reference.name].path, writer)
        for name, text in (texts or {}).items():
            writer.add_text(name, text)
        return writer.commit()


def merged_config(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the reference's config with the recipe's dtype and without traces of where it lay."""
    merged = {key: value for key, value in config.items() if key != "_name_or_path"}
    if recipe.dtype is not None:
        merged.pop("torch_dtype", None)
        merged["dtype"] = recipe.dtype
    return merged


def _floating(dtype: str) -> bool:
    return dtype in {"F64", "F32", "F16", "BF16"}


__all__ = ["DTYPES", "merged_config", "open_sources", "write_model"]
