"""Reading user files strictly: YAML without surprises, and validation errors in one line.

YAML is the safe subset without aliases and duplicate keys, capped in size and depth, because plain
loaders keep the last of two equal keys and an alias bomb of 300 bytes fills the memory.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from evomerge.errors import UserError, nearest

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 64

T = TypeVar("T", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys, naming the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
            for key in data:
                if key not in known:
                    raise ValueError(f'unknown key "{key}"{nearest(str(key), known)}')
        return data


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not a name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" is given twice', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: str, error: type[UserError]) -> Any:
    """Return the data of a YAML text.

    Args:
        text: At most 4 MiB, 64 levels deep, without aliases, tags or duplicate keys.
        where: What to call the text in messages, usually its path.
        error: The class of error to raise.
    """
    if len(text) > MAX_BYTES:
        raise error(f"{where}: too large: expected at most {MAX_BYTES} characters, got {len(text)}")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise error(f"{where}: line {line}: alias *{event.anchor}: not allowed; write the value out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise error(f"{where}: nested more than {MAX_DEPTH} levels deep")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        detail = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise error(f"{where}: not valid YAML: {line}{detail}") from None
    except ValueError as problem:
        raise error(f"{where}: not valid YAML: {problem}") from None


def read_text(path: Path, error: type[UserError]) -> str:
    """Return the text of a file, or raise `error` in one line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{path}: too large: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise error(f"{path}: not a text file in UTF-8") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None


def read_yaml(path: Path, error: type[UserError]) -> Any:
    """Return the data of a YAML file; see `parse_yaml`."""
    return parse_yaml(read_text(path, error), str(path), error)


def validated(model: type[T], data: Any, where: str, error: type[UserError]) -> T:
    """Return `data` as a `model`, or raise `error` naming the key, what was expected and what was got."""
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise error(f"{where}: {explain(problem)}") from None


def explain(problem: ValidationError) -> str:
    """Return the first fault of a validation error as one line."""
    faults = problem.errors(include_url=False)
    # A union reports a fault for each of its branches; the one deepest in the data is what the user meant.
    fault = max(faults, key=lambda f: ("unknown key" in f["msg"], len(f["loc"])))
    key = ".".join(str(part) for part in fault["loc"] if not _is_branch(part))
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default"
    shown = json.dumps(fault["input"], default=str)
    hint = ""
    if isinstance(fault["input"], str) and _looks_numeric(fault["input"]):
        hint = " (a text: write numbers without quotes, and 1e-3 as 1.0e-3)"
    return f"{key}: {message}, got {shown if len(shown) < 80 else shown[:77] + '...'}{hint}"


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"float", "int", "str", "bool", "tuple"})


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def canonical_json(data: Any) -> str:
    """Return the one JSON text of plain data: keys sorted, no spaces, floats by repr, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
