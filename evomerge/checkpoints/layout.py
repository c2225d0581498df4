"""Which layer and which part of the model a tensor belongs to, read from data files per family. No torch."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from evomerge.checkpoints.compatible import check_compatible
from evomerge.checkpoints.files import broken, show
from evomerge.checkpoints.source import Checkpoint
from evomerge.records import Place, Role

__all__ = ["Family", "Layout", "check_compatible", "layout_of"]

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_FIRST_NUMBER = re.compile(r"^(.*?)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Family:
    """How models of some types name their tensors.

    Attributes:
        name: The data file it comes from.
        model_types: Values of `model_type` in the config.
        layers: Name of a layer's tensors up to the layer's own part, with `{i}` for the index; None: to be
            found in the names.
        count: Key of the number of layers in the config; None: any of the usual ones.
        roles: Role to the parts of names that make it, in the order in which they are looked for.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str | None
    count: str | None
    roles: Mapping[Role, tuple[str, ...]]

    def role(self, name: str) -> Role:
        """Return the role of the first part that is in the name, `other` if none is."""
        for role, parts in self.roles.items():
            if any(part in name for part in parts):
                return role
        return "other"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor of a checkpoint sits.

    Attributes:
        family: Name of the family's data file; `generic` if the naming was guessed.
        num_layers: Number of decoder layers.
        places: Tensor name to place, in the checkpoint's order.
        tied: Whether the head is the embedding.
        order: Every role and the parts of names that make it, in the order in which they are looked for.
        layers: Name of a layer's tensors up to the layer's own part, with `{i}` for the index.
    """

    family: str
    num_layers: int
    places: dict[str, Place]
    tied: bool
    order: tuple[tuple[Role, tuple[str, ...]], ...]
    layers: str = "model.layers.{i}."

    def of_layer(self, name: str, layer: int) -> str:
        """Return the name that a layer's tensor has in another layer."""
        before, _ = self.layers.split("{i}")
        return before + str(layer) + name.removeprefix(before).lstrip("0123456789")

    def roles(self) -> tuple[Role, ...]:
        """Return the roles that occur, in the order in which names are matched; what is left is last."""
        present = {place.role for place in self.places.values()}
        matched = [role for role, _ in self.order if role in present]
        return (*matched, *sorted(present - set(matched)))

    def filters(self, role: Role) -> tuple[str, ...]:
        """Return the parts of names that make a role; empty for what is left when no other role matches.

        A part counts only where no part of a role earlier in `roles()` is in the name.
        """
        return dict(self.order).get(role, ())


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Return the place of every tensor of a checkpoint.

    Raises:
        SourceError: Layers are missing or more than the config says, or there is no embedding or head.
    """
    config = checkpoint.text_config
    family = _families().get(checkpoint.config["model_type"]) or _families()["generic"]
    count = _layer_count(checkpoint, config, family)
    named = family.layers or _guess_layers(checkpoint, count)
    before, after = named.split("{i}")
    pattern = re.compile(rf"^{re.escape(before)}(\d+){re.escape(after)}")
    layers = {name: int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name))}
    count = count or max(layers.values(), default=-1) + 1
    _check_layers(checkpoint, set(layers.values()), count, f"{before}N")
    places = {name: _place(name, family.role(name), layers.get(name), count) for name in checkpoint.tensors}
    tied = _check_ends(checkpoint, config, {place.role for place in places.values()})
    return Layout(family.name, count, places, tied, tuple(family.roles.items()), named)


def _place(name: str, role: Role, layer: int | None, count: int) -> Place:
    if layer is not None:
        return Place(name, role, layer, layer / max(1, count - 1))
    return Place(name, role, None, 1.0 if role in ("norm", "head") else 0.0)


def _layer_count(checkpoint: Checkpoint, config: Mapping[str, Any], family: Family) -> int:
    """Return the number of layers by the config; 0 if an unknown family does not say."""
    keys = (family.count,) if family.count else _COUNTS
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None and not family.count:
        return 0
    if type(found) is not int or found < 1:
        key = family.count or "number of layers"
        raise broken(
            checkpoint.path / "config.json", f"{key}: expected a positive integer, got {show(found)}"
        )
    return found


def _guess_layers(checkpoint: Checkpoint, count: int) -> str:
    """Return the pattern of the numbered prefix that covers most tensors, of those with `count` numbers."""
    numbers: dict[str, set[int]] = {}
    covered: Counter[str] = Counter()
    for name in checkpoint.tensors:
        if match := _FIRST_NUMBER.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
            covered[match[1]] += 1
    fitting = [prefix for prefix in covered if not count or len(numbers[prefix]) == count]
    if not covered:
        problem = (
            f"no numbered layers in the tensor names of model_type {show(checkpoint.config['model_type'])}"
        )
        raise broken(checkpoint.path, problem)
    return max(fitting or covered, key=lambda prefix: covered[prefix]) + ".{i}."


def _check_layers(checkpoint: Checkpoint, found: set[int], count: int, where: str) -> None:
    beyond = sorted(index for index in found if index >= count)
    if beyond:
        problem = f'tensors of layer {beyond[0]} ("{where}"), but the config has {count} layers'
        raise broken(
            checkpoint.path, f"{problem}, 0 to {count - 1}; config and weights do not belong together"
        )
    if len(found) < count:
        lowest = next(index for index in range(count) if index not in found)
        problem = f'no tensor of layer {lowest} ("{where}"), but the config has {count} layers'
        raise broken(checkpoint.path, f"{problem}; fetch the checkpoint again")


def _check_ends(checkpoint: Checkpoint, config: Mapping[str, Any], roles: Iterable[Role]) -> bool:
    """Return whether head and embedding are tied, after checking that there is what there must be."""
    if "embedding" not in roles:
        raise broken(checkpoint.path, "no embedding among the tensors; only language models can be merged")
    tied = config.get("tie_word_embeddings")
    if tied is False and "head" not in roles:
        raise broken(checkpoint.path, "tie_word_embeddings is false, but no head (lm_head) is stored")
    # Some types are tied by default and their configs do not say so.
    return tied is True or "head" not in roles


@functools.cache
def _families() -> dict[str, Family]:
    """Return the families by model type, and the one for unknown types as `generic`."""
    known: dict[str, Family] = {}
    for file in resources.files("evomerge.checkpoints").joinpath("families").iterdir():
        if file.name.endswith(".json"):
            data = json.loads(file.read_text("utf-8"))
            name = file.name.removesuffix(".json")
            roles = {cast(Role, role): tuple(parts) for role, parts in data["roles"].items()}
            family = Family(name, tuple(data["model_types"]), data["layers"], data["count"], roles)
            known |= dict.fromkeys(family.model_types or ("generic",), family)
    return known
