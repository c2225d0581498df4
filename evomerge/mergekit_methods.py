"""Mergekit's merge methods, and where their parameters differ from those of the catalogue. No torch.

Parameters are the same by name and meaning unless a table here says otherwise. Facts are those of
mergekit 0.1.5; `scripts/compare_mergekit` holds `PEERS` against the mergekit that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.catalogue import CATALOGUE, Method, Parameter
from evomerge.errors import RecipeError, nearest

REQUIRED = "required"
"""Stands for a default that mergekit does not have."""

IGNORED = frozenset({"int8_mask"})
"""Parameters that change how mergekit computes, not what."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A method as mergekit has it.

    Attributes:
        base: Whether one must be given or may be given; `member`: it is a model like any other.
        source: Parameters with a value for each model, and their defaults.
        method: Parameters of the method as a whole, and their defaults.
        idle: Parameters that it takes and makes no use of.
    """

    base: Literal["required", "optional", "member"]
    source: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


def _deltas(normalize: bool, rescale: bool, thins: bool = True, **source: float) -> Peer:
    """Return a method of the family that thins deltas, sums them and adds them to the base."""
    return Peer(
        "required",
        {"weight": REQUIRED, "density": 1.0, **source},
        {"normalize": normalize, "rescale": rescale, "lambda": 1.0},
        frozenset() if thins else frozenset({"density", "rescale"}),
    )


PEERS: Mapping[str, Peer] = {
    "linear": Peer("member", {"weight": REQUIRED}, {"normalize": True}),
    "slerp": Peer("required", {}, {"t": REQUIRED}),
    "nuslerp": Peer("optional", {"weight": REQUIRED}, {"nuslerp_row_wise": False, "nuslerp_flatten": True}),
    "multislerp": Peer("optional", {"weight": REQUIRED}, {"normalize_weights": True, "eps": 1e-8}),
    "karcher": Peer("member", {}, {"max_iter": 10, "tol": 1e-5}),
    "task_arithmetic": _deltas(False, False, thins=False),
    "ties": _deltas(True, False),
    "dare_linear": _deltas(False, True),
    "dare_ties": _deltas(False, True),
    "breadcrumbs": _deltas(False, False, gamma=0.01),
    "breadcrumbs_ties": _deltas(False, False, gamma=0.01),
    "della": _deltas(True, True, epsilon=0.15),
    "della_linear": _deltas(False, True, epsilon=0.15),
    "model_stock": Peer("required", {}, {"filter_wise": False}),
    "sce": Peer("required", {}, {"select_topk": 1.0}),
    "arcee_fusion": Peer("required"),
    "nearswap": Peer("required", {}, {"t": REQUIRED}),
    "ram": Peer("required", {}, {"epsilon": 1e-5}),
    "ramplus_tl": Peer("required", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "passthrough": Peer("member", {"scale": 1.0}),
}

OURS: Mapping[str, Any] = {"variant": "mergekit", "clamp": False, "lines_alpha": 1.0, "lines_beta": 0.0}
"""Parameters that mergekit lacks, with the value that means what it does."""

RESCALE = {True: "l1", False: "none"}
"""mergekit's switch and the value of `rescale` that it stands for."""


def peer_of(name: str, where: str) -> Peer:
    """Return mergekit's method of a name.

    Raises:
        RecipeError: mergekit has none, or evomerge has none that does the same.
    """
    if name not in PEERS or name not in CATALOGUE or not CATALOGUE[name].mergekit:
        known = [each for each in PEERS if each in CATALOGUE and CATALOGUE[each].mergekit]
        raise RecipeError(f'{where}: merge_method: "{name}" is not supported{nearest(name, known)}')
    return PEERS[name]


def value_read(value: Any, parameter: Parameter) -> Any:
    """Return mergekit's value as a parameter of the catalogue takes it; switches may be 0 and 1 there."""
    switch = isinstance(value, bool | int | float) and value in (0, 1)
    if parameter.name == "rescale" and switch:
        return RESCALE[bool(value)]
    return bool(value) if switch and set(parameter.choices) == {True, False} else value


def value_written(value: Any, parameter: Parameter) -> Any:
    """Return a value of the catalogue's parameter as mergekit takes it.

    Raises:
        RecipeError: mergekit has no such value.
    """
    if parameter.name != "rescale":
        return value
    for written, ours in RESCALE.items():
        if value == ours:
            return written
    raise RecipeError(f'mergekit cannot rescale by "{value}"; it knows l1 and none')


def defaults_read(method: Method, peer: Peer, scope: str) -> dict[str, Any]:
    """Return what the parameters of a scope are where a mergekit file leaves them out.

    Those that mergekit demands are not among them.
    """
    given = {**peer.source, **peer.method}
    found = {}
    for parameter in method.parameters:
        if parameter.scope != scope:
            continue
        if parameter.name in given:
            if given[parameter.name] != REQUIRED:
                found[parameter.name] = value_read(given[parameter.name], parameter)
        else:
            found[parameter.name] = value_there(parameter)
    return found


def value_there(parameter: Parameter) -> Any:
    """Return the value of a parameter that mergekit lacks which means what mergekit does."""
    return OURS.get(parameter.name, parameter.default)


def check_parameter(name: str, value: Any, method: Method, peer: Peer, where: str) -> bool:
    """Return whether a parameter of a mergekit file means anything.

    Raises:
        RecipeError: There is no such parameter, or none that does the same.
    """
    if name in IGNORED or name in peer.idle:
        return False
    there = {**peer.source, **peer.method}
    here = {parameter.name for parameter in method.parameters}
    if name not in there:
        known = sorted(here & set(there))
        raise RecipeError(f'{where}: method "{method.name}" has no parameter "{name}"{nearest(name, known)}')
    if name in here:
        return True
    if value == there[name]:
        return False
    raise RecipeError(f"{where}: not supported; {there[name]!r} is, got {value!r}")
