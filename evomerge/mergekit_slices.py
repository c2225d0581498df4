"""Mergekit's slices and parameter settings as slices and rules of a recipe. No torch.

A gradient runs there over the layers of one output slice; what lies outside the layers has its first value,
and the only layer of a slice its last. Settings of embedding, head and final norm are those of the first
and the last slice. A setting of a model is looked up under the tensor's name in that model, one of the method
under its name in the merged model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.catalogue import Method, Parameter
from evomerge.errors import RecipeError, nearest, one_line
from evomerge.mergekit_methods import Peer, check_parameter, defaults_read, value_read
from evomerge.mergekit_models import Key

Settings = list[tuple[Mapping[str, Any], str]]
"""Parameters and where they stand, from the innermost to the outermost."""

Rules = list[dict[str, Any]]
"""Rules of a recipe as plain data."""

FINAL_NORMS = ("model.norm.", "final_layer_norm.", "final_layernorm.", "ln_f.")
"""Parts of the names of norms behind the last layer."""

SCALARS = (bool, int, float, str)

LAYER_WORDS = ("layers", "layer", "h", "blocks", "block")
"""What comes before a layer's number in tensor names."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of a slice.

    Attributes:
        key: The model.
        layers: First layer and the one behind the last; None: all of them.
        settings: Its own parameters.
        where: Where it stands, for messages.
    """

    key: Key
    layers: tuple[int, int] | None
    settings: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Piece:
    """An output slice, or the whole model where a file lists models.

    Attributes:
        entries: Its models.
        settings: Parameters of the slice, then those further out, each with where they stand.
        base: The base model that holds for it.
        where: Where it stands, for messages.
    """

    entries: Sequence[Entry]
    settings: Settings
    base: Key | None
    where: str

    @property
    def count(self) -> int:
        """Number of layers; 0 if it is the whole model."""
        first, end = self.entries[0].layers or (0, 0)
        return end - first


@dataclass(slots=True)
class Member:
    """A source of the recipe, and its entry in each piece that it takes part in."""

    key: Key
    entries: dict[int, Entry] = field(default_factory=dict)


def members_of(pieces: Sequence[Piece], method: Method, peer: Peer) -> list[Member]:
    """Return the sources of all pieces, in an order that holds for each of them.

    A base that is what deltas are from is none of them; any other base comes first. A model that a slice
    names twice, or that the slices have in different orders where the order has a meaning, becomes more than
    one source.
    """
    apart = method.takes_base and peer.base != "member"
    ordered = method.ordered or method.max_sources == 2
    members: list[Member] = []
    for i, piece in enumerate(pieces):
        bases = [entry for entry in piece.entries if entry.key == piece.base]
        others = [entry for entry in piece.entries if entry.key != piece.base]
        last = -1
        for entry in others if apart else [*bases, *others]:
            fitting = (
                j
                for j, member in enumerate(members)
                if member.key == entry.key and i not in member.entries and (j > last or not ordered)
            )
            last = next(fitting, len(members))
            if last == len(members):
                members.append(Member(entry.key))
            members[last].entries[i] = entry
    if peer.base == "member" and not ordered:
        # Config and tokenizer are those of the base there, and of the first source here.
        members.sort(key=lambda member: member.key != pieces[0].base)
    return members


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the settings of a file whose pieces are known.

    Attributes:
        method: The method of the catalogue.
        peer: The same one as mergekit has it.
        pieces: The slices.
        sliced: Whether the recipe has slices.
    """

    method: Method
    peer: Peer
    pieces: Sequence[Piece]
    sliced: bool

    def of_method(self) -> dict[str, Rules]:
        """Return the parameters of the method as a whole."""
        chains = {i: list(piece.settings) for i, piece in enumerate(self.pieces)}
        return self._read("method", chains, {})

    def of_member(self, member: Member) -> dict[str, Rules]:
        """Return the parameters of a source."""
        chains, shifts = {}, {}
        for i, entry in member.entries.items():
            own = (entry.settings, f"{entry.where}.parameters")
            for name in entry.settings:
                if check_parameter(name, entry.settings[name], self.method, self.peer, f"{own[1]}.{name}"):
                    self._check_own(name, f"{own[1]}.{name}")
            chains[i] = [own, *self.pieces[i].settings]
            shifts[i] = sum(piece.count for piece in self.pieces[:i]) - (entry.layers or (0, 0))[0]
        return self._read("source", chains, shifts if self.sliced else {})

    def _check_own(self, name: str, where: str) -> None:
        if self.method.parameter(name).scope != "source":
            raise RecipeError(f"{where}: this parameter belongs to the method as a whole")

    def check(self) -> None:
        """Raise RecipeError for parameters of slices and file that the method does not have."""
        for piece in self.pieces:
            for settings, where in piece.settings:
                for name, value in settings.items():
                    check_parameter(name, value, self.method, self.peer, f"{where}.{name}")

    def _read(
        self, scope: str, chains: Mapping[int, Settings], shifts: Mapping[int, int]
    ) -> dict[str, Rules]:
        """Return the rules of each parameter of a scope.

        Args:
            scope: `source` or `method`.
            chains: Number of a piece to its settings and where they stand; those further in come first.
            shifts: Number of a piece to what layer numbers in filters grow by; empty: nowhere.
        """
        defaults = defaults_read(self.method, self.peer, scope)
        found: dict[str, Rules] = {}
        for parameter in self.method.parameters:
            if parameter.scope != scope:
                continue
            rules = {
                i: [
                    rule
                    for settings, where in chain
                    if parameter.name in settings
                    for rule in self._rules(i, settings[parameter.name], parameter, shifts.get(i, 0), where)
                ]
                for i, chain in chains.items()
            }
            joined = self._joined(rules)
            if parameter.name in defaults:
                joined.append({"value": defaults[parameter.name]})
            if joined:
                found[parameter.name] = joined
        return found

    def _joined(self, rules: Mapping[int, Rules]) -> Rules:
        """Return the rules of all slices as one list, naming slices only where it makes a difference."""
        lists = list(rules.values())
        gradients = any(isinstance(rule["value"], list) for each in lists for rule in each)
        if all(each == lists[0] for each in lists) and not (gradients and self.sliced):
            return list(lists[0])
        joined = [{"slice": i, **rule} for i, each in rules.items() for rule in each]
        if all(each and each[-1].keys() == {"value"} for each in lists):
            # Every slice has a value for all of its tensors, so that of the last one may be the general one.
            value = joined[-1]["value"]
            if isinstance(value, list):
                joined.append({"value": value[-1]})
            else:
                joined[-1] = {"value": value}
        return joined

    def _rules(self, index: int, setting: Any, parameter: Parameter, shift: int, where: str) -> Rules:
        """Return the rules of one setting in one piece, without the piece's number."""
        rules: Rules = []
        for part, value in _conditions(setting, f"{where}.{parameter.name}"):
            count = self.pieces[index].count
            if part is not None and shift:
                moved = _renumbered(part, shift, f"{where}.{parameter.name}")
                if moved is None:
                    continue
                part = moved
            values = [value_read(each, parameter) for each in (value if isinstance(value, list) else [value])]
            if len(values) > 1:
                rules += self._outside(index, values[0], part)
            # Several values run over the layers of the slice; an only layer lies at the end.
            single = len(values) == 1 or (self.sliced and count == 1)
            rules.append({**_match(part), "value": values[-1] if single else values})
        return rules

    def _outside(self, index: int, value: Any, part: str | None) -> Rules:
        """Return the rules that give what lies outside the layers a gradient's first value."""
        rules: Rules = []
        if index == 0 and self.sliced and self.pieces[0].count == 1:
            rules.append({"role": "embedding", **_match(part), "value": value})
        if index == len(self.pieces) - 1:
            finals = [name for name in FINAL_NORMS if part is None or part in name + "weight"]
            rules.append({"role": "head", **_match(part), "value": value})
            rules += [{"role": "norm", "match": name, "value": value} for name in finals]
        return rules


def _match(part: str | None) -> dict[str, str]:
    return {} if part is None else {"match": part}


def _conditions(setting: Any, where: str) -> Iterable[tuple[str | None, Any]]:
    """Yield the filter (None: any tensor) and the value or gradient of each part of a setting."""
    items = [setting] if isinstance(setting, dict) else setting
    if not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
        items = [{"value": setting}]
    for item in items:
        for key in item:
            if key not in ("filter", "value"):
                raise RecipeError(f'{where}: unknown key "{key}"{nearest(str(key), ["filter", "value"])}')
        part = None if item.get("filter") in (None, "*") else str(item["filter"])
        value = item.get("value")
        if not isinstance(value, SCALARS) and not (
            isinstance(value, list) and value and all(isinstance(each, SCALARS) for each in value)
        ):
            raise RecipeError(
                f"{where}: expected a value or a list of values, got {one_line(str(value))[:80]}"
            )
        yield part, value


def _renumbered(part: str, shift: int, where: str) -> str | None:
    """Return a filter on a model's tensor names as one on the merged model's; None if it matches none."""
    found = re.search(r"(?:^|\.)(\d+)(\.|$)", part)
    if found is None:
        return part
    before = part[: found.start()]
    word = before.rpartition(".")[2]
    if word in LAYER_WORDS and found[2]:
        number = int(found[1]) + shift
        return f"{before}.{number}{part[found.end(1) :]}" if number >= 0 else None
    cut = word == before and any(known.endswith(word) for known in LAYER_WORDS)
    if cut or word in LAYER_WORDS:
        raise RecipeError(
            f'{where}: the filter "{part}" depends on layer numbers, which differ between the model and the '
            'merged one; write them between dots, as in "layers.3.", or use other filters'
        )
    return part
