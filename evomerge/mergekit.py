"""Reading mergekit's merge configs as recipes. No torch.

What has no counterpart here is refused by name, never dropped. `mergekit_methods` says what methods and
parameters are called there, `mergekit_slices` how slices, filters and gradients are read; `mergekit_writer`
goes the other way, `mergekit_evolve` reads the configs of mergekit-evolve.

mergekit casts the sources to `dtype` (where it is left out, to the widest dtype among them) before it
merges, works in it in most methods, and writes `out_dtype`. Here the sources are read as they are, work is
done in float32 at least, and the result is rounded once to `out_dtype`, else `dtype`; so results agree to
the rounding of `dtype` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.catalogue import Method, method_named
from evomerge.errors import RecipeError, nearest
from evomerge.mergekit_methods import REQUIRED, Peer, peer_of
from evomerge.mergekit_models import Key, layer_count, model_key, unique
from evomerge.mergekit_slices import Entry, Member, Piece, Reader, Settings, members_of
from evomerge.mergekit_tokens import read_tokenizer
from evomerge.recipe import UNION, Recipe, parse_recipe, read_recipe
from evomerge.strict import read_yaml

__all__ = ["from_mergekit", "model_key", "read_any_recipe", "unique"]

KNOWN = frozenset(
    {
        "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "name", "chat_template",
    }
)  # fmt: skip

KNOWN_SLICE = frozenset({"sources", "parameters", "base_model"})


def read_any_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file of either evomerge or mergekit."""
    data = read_yaml(path, RecipeError)
    if isinstance(data, dict) and {"genome", "space"} & set(data):
        raise RecipeError(f"{path}: this is a run config, not a recipe; use `evomerge run {path}`")
    if isinstance(data, dict) and "merge_method" in data:
        return from_mergekit(data, str(path))
    return read_recipe(path)


def from_mergekit(data: Mapping[str, Any], where: str) -> Recipe:
    """Return a mergekit merge config as a recipe.

    A slice over all layers of its models is read as if the models were listed; whether it is one is only
    known of models that are on this machine.

    Raises:
        RecipeError: It uses something that has no counterpart here.
    """
    for unknown in [key for key in data if key not in KNOWN]:
        raise RecipeError(f'{where}: unknown key "{unknown}"{nearest(str(unknown), KNOWN)}')
    peer = peer_of(str(data["merge_method"]), where)
    method = method_named(str(data["merge_method"]))
    pieces = _pieces(data, peer, where)
    sliced = not _is_whole(pieces)
    base = _base_of(pieces, method, peer, where)
    members = members_of(pieces, method, peer)
    reader = Reader(method, peer, pieces, sliced)
    reader.check()
    names: list[str] = []
    for member in members:
        names.append(unique(Path(member.key[0]).name, {UNION, *names}))
    recipe: dict[str, Any] = {
        "method": method.name,
        "sources": [
            {**_ref(name, member.key), "parameters": reader.of_member(member)}
            for name, member in zip(names, members, strict=True)
        ],
        "parameters": reader.of_method(),
        "dtype": str(data.get("out_dtype") or data.get("dtype") or "").removeprefix("torch.") or None,
    }
    # A model that is more than one source goes by the first one's name.
    known = {member.key: name for name, member in reversed(list(zip(names, members, strict=True)))}
    if base is not None:
        known[base] = unique(Path(base[0]).name, {UNION, *names})
        recipe["base"] = _ref(known[base], base)
    if sliced:
        recipe["slices"] = [
            {"layers": _spans(i, piece, dict(zip(names, members, strict=True)), base, known)}
            for i, piece in enumerate(pieces)
        ]
    recipe |= read_tokenizer(data, known, pieces[0].base, where)
    return parse_recipe({k: v for k, v in recipe.items() if v is not None}, where)


def _ref(name: str, key: Key) -> dict[str, Any]:
    return {"name": name, "path": key[0], "revision": key[1]}


def _pieces(data: Mapping[str, Any], peer: Peer, where: str) -> list[Piece]:
    """Return the slices of a config, or its models as one piece."""
    outer: Settings = [(_mapping(data.get("parameters"), f"{where}: parameters"), f"{where}: parameters")]
    if data.get("modules") is not None:
        data, outer, where = _module(data, outer, where)
    if (data.get("models") is None) == (data.get("slices") is None):
        raise RecipeError(f"{where}: expected either models or slices")
    base = model_key(data["base_model"], f"{where}: base_model") if data.get("base_model") else None
    if data.get("models") is not None:
        entries = _entries(data["models"], False, f"{where}: models")
        if base is not None and base not in [entry.key for entry in entries]:
            # mergekit puts a base that is not listed behind the models.
            _check_unlisted(base, outer, peer, where)
            entries.append(Entry(base, None, {}, f"{where}: base_model"))
        return [Piece(entries, outer, base, f"{where}: models")]
    if not isinstance(data["slices"], list) or not data["slices"]:
        raise RecipeError(f"{where}: slices: expected a list of mappings with sources each")
    pieces = [_slice(given, outer, base, f"{where}: slices.{i}") for i, given in enumerate(data["slices"])]
    if len(pieces[0].entries) < len(pieces[-1].entries):
        raise RecipeError(
            f"{pieces[-1].where}.sources: more models than in the first slice, so mergekit leaves the last "
            "of them out of head and final norm; list as many in the first slice, with weight 0"
        )
    return pieces


def _check_unlisted(base: Key, outer: Settings, peer: Peer, where: str) -> None:
    """Raise RecipeError if a base that is merged like any other model lacks a parameter that it needs."""
    given = {name for settings, _ in outer for name in settings}
    missing = [name for name, default in peer.source.items() if default == REQUIRED and name not in given]
    if peer.base == "member" and missing:
        raise RecipeError(f"{where}: base_model: {base[0]} takes part in the merge; give its {missing[0]}")


def _module(data: Mapping[str, Any], outer: Settings, where: str) -> tuple[dict[str, Any], Settings, str]:
    """Return the only module of a config in place of the config itself."""
    modules = data["modules"]
    if (
        not isinstance(modules, dict)
        or list(modules) != ["default"]
        or data.get("models")
        or data.get("slices")
    ):
        raise RecipeError(
            f'{where}: modules: only the module "default" alone is supported, as language models have'
        )
    place = f"{where}: modules.default"
    module = _mapping(modules["default"], place)
    for key in module:
        if key not in ("models", "slices", "parameters"):
            raise RecipeError(
                f'{place}: unknown key "{key}"{nearest(str(key), ["models", "slices", "parameters"])}'
            )
    own = (_mapping(module.get("parameters"), f"{place}.parameters"), f"{place}.parameters")
    return {**module, "base_model": data.get("base_model")}, [own, *outer], where


def _slice(given: Any, outer: Settings, base: Key | None, where: str) -> Piece:
    """Return one output slice."""
    slice_ = _mapping(given, where)
    for key in slice_:
        if key not in KNOWN_SLICE:
            raise RecipeError(f'{where}: unknown key "{key}"{nearest(str(key), KNOWN_SLICE)}')
    if slice_.get("base_model"):
        base = model_key(slice_["base_model"], f"{where}.base_model")
    entries = _entries(slice_.get("sources"), True, f"{where}.sources")
    own = (_mapping(slice_.get("parameters"), f"{where}.parameters"), f"{where}.parameters")
    return Piece(entries, [own, *outer], base, where)


def _entries(given: Any, ranged: bool, where: str) -> list[Entry]:
    """Return the models of a slice, or those that are listed, which have no layer range."""
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given) or not given:
        raise RecipeError(f"{where}: expected a list of mappings with a model each")
    known = ["model", "parameters", *(["layer_range"] if ranged else [])]
    entries = []
    for i, entry in enumerate(given):
        place = f"{where}.{i}"
        for key in entry:
            if key not in known:
                raise RecipeError(f'{place}: unknown key "{key}"{nearest(str(key), known)}')
        layers = _range(entry.get("layer_range"), f"{place}: layer_range") if ranged else None
        settings = _mapping(entry.get("parameters"), f"{place}.parameters")
        entries.append(Entry(model_key(entry.get("model"), place), layers, settings, place))
    return entries


def _range(given: Any, where: str) -> tuple[int, int]:
    whole = isinstance(given, list) and len(given) == 2 and all(type(end) is int for end in given)
    if not whole or not 0 <= given[0] < given[1]:
        raise RecipeError(f"{where}: expected the first layer and the one behind the last, got {given!r}")
    return given[0], given[1]


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected a mapping")
    return given


def _base_of(pieces: Sequence[Piece], method: Method, peer: Peer, where: str) -> Key | None:
    """Return what deltas are from; None if they are from nothing.

    Raises:
        RecipeError: There is no base, not one for all, or a slice lacks it.
    """
    if peer.base == "member":
        return None
    for piece in pieces:
        if piece.base is None:
            if peer.base == "required":
                wanted = "works on deltas from a base" if method.takes_base else "starts at one of its models"
                raise RecipeError(f"{where}: base_model: missing; method {method.name} {wanted}")
            continue
        own = [entry for entry in piece.entries if entry.key == piece.base]
        if not own:
            raise RecipeError(f"{piece.where}: the base model {piece.base[0]} is missing")
        if method.takes_base and (len(own) > 1 or own[0].settings):
            problem = "is there twice" if len(own) > 1 else "takes no parameters"
            raise RecipeError(f"{own[0].where}: the base {problem}")
        if method.takes_base and piece.base != pieces[0].base:
            raise RecipeError(
                f"{piece.where}.base_model: all slices have one base, expected {pieces[0].base}"
            )
    return pieces[0].base if method.takes_base else None


def _is_whole(pieces: Sequence[Piece]) -> bool:
    """Whether there is one slice and it holds all layers of its models, each model once."""
    if len(pieces) > 1 or len({entry.key for entry in pieces[0].entries}) < len(pieces[0].entries):
        return False
    return all(e.layers is None or e.layers == (0, layer_count(*e.key)) for e in pieces[0].entries)


def _spans(
    index: int, piece: Piece, members: Mapping[str, Member], base: Key | None, known: Mapping[Key, str]
) -> dict[str, tuple[int, int]]:
    """Return the layers that a slice has of each source and of the base."""
    entries = {name: member.entries[index] for name, member in members.items() if index in member.entries}
    entries |= {known[entry.key]: entry for entry in piece.entries if entry.key == base}
    return {name: entry.layers for name, entry in entries.items() if entry.layers is not None}
