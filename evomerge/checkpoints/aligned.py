"""Checkpoints whose embedding and head are brought into the order of another vocabulary. No torch until read.

Tokens are matched by their text. As in mergekit 0.1.5, a token that a source lacks gets the base's row if the
base has it, else the mean of the rows of the sources that have it (perhaps one), else zeros; the recipe's
`tokens` may say otherwise. Rows that belong to no token, such as those that pad the number of rows, get the
mean of the source's aligned rows (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from evomerge.checkpoints.files import broken
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.source import Checkpoint
from evomerge.checkpoints.vocabulary import TargetVocabulary, target_vocabulary
from evomerge.errors import RecipeError
from evomerge.recipe import ModelToken, Recipe, TokenRow

if TYPE_CHECKING:
    import torch

_BLOCK = 4096  # rows; a few dozen megabytes in float32
_POSITIONS = ("position", "wpe.", "token_type")
"""Parts of the names of embeddings that are not of tokens."""


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of one source's aligned tensors come from; rows not mentioned are zeros.

    Attributes:
        copied: Source name to target rows and the rows of that source that they are.
        averaged: Source names to target rows and, for each of those sources, the rows to take the mean of.
        padding: Target rows that no token has.
    """

    copied: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    averaged: dict[tuple[str, ...], tuple[list[int], list[list[int]]]] = field(default_factory=dict)
    padding: list[int] = field(default_factory=list)

    def copy(self, target: int, source: str, row: int) -> None:
        """Plan one row as that of a source."""
        targets, rows = self.copied.setdefault(source, ([], []))
        targets.append(target)
        rows.append(row)

    def average(self, target: int, rows: Mapping[str, int]) -> None:
        """Plan one row as the mean over sources."""
        targets, lists = self.averaged.setdefault(tuple(rows), ([], [[] for _ in rows]))
        targets.append(target)
        for column, row in zip(lists, rows.values(), strict=True):
            column.append(row)

    def changes(self, source: str, rows: int) -> bool:
        """Whether it differs from the source as it is, which has so many rows."""
        every = list(range(rows))
        return bool(self.averaged or self.padding) or self.copied != {source: (every, every)}


class AlignedCheckpoint(Checkpoint):
    """A checkpoint with embedding and head in the rows of a target vocabulary; the rest passes through.

    Rows taken from another source are rounded to the dtype that the tensor has in this one. Fingerprint and
    path are those of the checkpoint it is made of: with the recipe they say what it is.

    Args:
        originals: Source name to checkpoint.
        name: The source it is made of.
        target: The vocabulary.
        plans: Tensor name to where its rows come from.
    """

    def __init__(
        self,
        originals: Mapping[str, Checkpoint],
        name: str,
        target: TargetVocabulary,
        plans: Mapping[str, RowPlan],
    ) -> None:
        source = originals[name]
        self._originals, self._source, self._target, self._plans = originals, source, target, plans
        super().__init__(source.path, target.config(source.config), source.files, [])
        self.ignored = source.ignored
        self.tensors = dict(source.tensors)
        for tensor in plans:
            info = source.tensors[tensor]
            shape = (target.rows or info.shape[0], *info.shape[1:])
            nbytes = info.nbytes // info.shape[0] * shape[0]
            self.tensors[tensor] = replace(info, shape=shape, nbytes=nbytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the content of the checkpoint it is made of."""
        return self._source.fingerprint

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the vocabulary of the checkpoint it is made of."""
        return self._source.tokenizer_fingerprint

    def is_stored(self, name: str) -> bool:
        """Whether `tensor(name)` is a view of a file; aligned tensors are made each time."""
        return name not in self._plans and self._source.is_stored(name)

    def scan_finite(self) -> None:
        """Read all weights of the checkpoint it is made of once and check them.

        Raises:
            SourceError: As for any checkpoint.
        """
        self._source.scan_finite()

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, with aligned rows where it has one for each token.

        Raises:
            SourceError: There is no such tensor, or its file changed since the checkpoint was opened.
        """
        if name not in self._plans:
            return self._source.tensor(name)
        import torch

        plan = self._plans[name]
        out = torch.zeros(self.tensors[name].shape, dtype=self._source.tensor(name).dtype)
        for donor, (targets, rows) in plan.copied.items():
            given = self._originals[donor].tensor(name)
            for part in _blocks(len(targets)):
                out[targets[part]] = given[rows[part]].to(out.dtype)
        for donors, (targets, lists) in plan.averaged.items():
            for part in _blocks(len(targets)):
                total = torch.zeros(len(targets[part]), *out.shape[1:])
                for donor, rows in zip(donors, lists, strict=True):
                    total += self._originals[donor].tensor(name)[rows[part]]
                out[targets[part]] = (total / len(donors)).to(out.dtype)
        if plan.padding:
            out[plan.padding] = _mean(out, plan.padding)
        return out


def align(
    checkpoints: Mapping[str, Checkpoint], recipe: Recipe
) -> tuple[dict[str, Checkpoint], TargetVocabulary]:
    """Return a recipe's checkpoints with one vocabulary among them.

    Args:
        checkpoints: Source name to checkpoint, for every source of the recipe, checked to fit together but
            for their vocabularies.
        recipe: With the wishes for the vocabulary; with slices, a token's default row comes from the sources
            that take part in the slice that gives the tensor.

    Returns:
        The recipe's checkpoints under their names, those themselves that need no alignment; and the
        vocabulary, which writes the tokenizer.

    Raises:
        RecipeError: `tokens` asks for a row that is not there, or the chat template is unknown.
        SourceError: A vocabulary cannot be read, or a tensor cannot be aligned.
    """
    used = {ref.name: checkpoints[ref.name] for ref in recipe.refs}
    layout = layout_of(used[recipe.reference.name])
    rows = {name: vocabulary_rows(checkpoint, layout) for name, checkpoint in used.items()}
    target = target_vocabulary(used, rows, recipe)
    if target.rows is None:
        return dict(used), target
    tensors = _indexed(used, layout, rows)
    fixed = {token: _row(token, row, target, rows) for token, row in recipe.tokens.items()}
    givers = {tensor: _taking_part(recipe, layout.places[tensor].role) for tensor in tensors}
    aligned: dict[str, Checkpoint] = {}
    for name, checkpoint in used.items():
        plan = {group: _plan(name, target, group, recipe, fixed) for group in set(givers.values())}
        plans = {tensor: plan[group] for tensor, group in givers.items()}
        changed = rows[name] != target.rows or any(p.changes(name, target.rows) for p in plan.values())
        aligned[name] = AlignedCheckpoint(used, name, target, plans) if changed else checkpoint
    return aligned, target


def vocabulary_rows(checkpoint: Checkpoint, layout: Layout) -> int:
    """Return the number of rows of a checkpoint's embedding, padding included."""
    names = [name for name, place in layout.places.items() if place.role == "embedding"]
    return next(checkpoint.tensors[name].shape[0] for name in names if not _of_positions(name))


def _of_positions(name: str) -> bool:
    return any(part in name for part in _POSITIONS)


def _indexed(used: Mapping[str, Checkpoint], layout: Layout, rows: Mapping[str, int]) -> list[str]:
    """Return the tensors with a row for each token."""
    outside = [place for place in layout.places.values() if place.layer is None]
    names = [p.name for p in outside if p.role in ("embedding", "head") and not _of_positions(p.name)]
    for source, checkpoint in used.items():
        for name in names:
            shape = checkpoint.tensors[name].shape
            if not shape or shape[0] != rows[source]:
                problem = f'tensor "{name}" is {list(shape)}, expected {rows[source]} rows, one per token'
                raise broken(source, f"{problem}; vocabularies of such models cannot be aligned")
    return names


def _taking_part(recipe: Recipe, role: str) -> tuple[str, ...]:
    """Return the sources that an embedding or head is merged from: those of the first or the last slice."""
    names = tuple(ref.name for ref in recipe.refs)
    if not recipe.slices:
        return names
    piece = recipe.slices[-1 if role == "head" else 0]
    return tuple(name for name in names if name in piece.layers)


def _row(
    token: str, row: TokenRow, target: TargetVocabulary, rows: Mapping[str, int]
) -> tuple[str, int] | None:
    """Return source and row that `tokens` asks for; None for zeros."""
    if row.model is None:
        return None
    wanted = token
    if isinstance(row.source, ModelToken):
        if row.source.token_id is not None:
            if row.source.token_id >= rows[row.model]:
                got = f"expected an id below {rows[row.model]}, got {row.source.token_id}"
                raise RecipeError(f'tokens.{token!a}.source.token_id: {got} of "{row.model}"')
            return row.model, row.source.token_id
        wanted = str(row.source.token)
    number = target.sources[row.model].get(wanted)
    if number is None:
        problem = f'"{row.model}" has no token {wanted!a}'
        raise RecipeError(f"tokens.{token!a}.source: {problem}; name a source that has it, or kind: zero")
    return row.model, number


def _plan(
    name: str,
    target: TargetVocabulary,
    taking_part: Sequence[str],
    recipe: Recipe,
    fixed: Mapping[str, tuple[str, int] | None],
) -> RowPlan:
    plan = RowPlan()
    own = target.sources[name]
    base = recipe.base.name if recipe.base and recipe.base.name in taking_part else None
    # Of two tokens with one id the last counts.
    by_number = {number: token for token, number in target.tokens.items()}
    for number, token in sorted(by_number.items()):
        wish = recipe.tokens.get(token)
        if token in own and not (wish and wish.force):
            plan.copy(number, name, own[token])
        elif wish:
            given = fixed[token]
            if given is not None:
                plan.copy(number, *given)
        elif base is not None and token in target.sources[base]:
            plan.copy(number, base, target.sources[base][token])
        else:
            having = {other: target.sources[other].get(token, -1) for other in taking_part}
            having = {other: row for other, row in having.items() if row >= 0}
            if having:
                plan.average(number, having)
    plan.padding.extend(number for number in range(target.rows or 0) if number not in by_number)
    return plan


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, start + _BLOCK)


def _mean(out: torch.Tensor, without: Sequence[int]) -> torch.Tensor:
    """Return the mean of the rows of a tensor but for some, which are zeros, in its dtype."""
    total = out[:0].double().sum(0)
    for part in _blocks(len(out)):
        total += out[part].double().sum(0)
    return (total / max(1, len(out) - len(without))).to(out.dtype)
