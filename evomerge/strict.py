"""Reading user files strictly: YAML without surprises, and validation errors in one line.

YAML is the safe subset without aliases, tags and duplicate keys, capped in size and depth, because plain
loaders keep the last of two equal keys and an alias bomb of 300 bytes fills the memory. Numbers are those
of YAML 1.2: 1e-3 is a number, 010 is ten, and 1:30 and 2026-01-01 are texts. Switches are those of YAML
1.1 (`no` is false), because that is what people mean by them here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from evomerge.errors import UserError, closest, nearest, one_line
from evomerge.reading import read_bytes

MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_EVENTS = 50_000
"""Most values and collections of a YAML text; a second's work for its parser."""

MISSING = "missing; it has no default"

MOST_LOOKED_AT = 50
"""Most wrong names of a section of which the nearest known one is looked for."""

_UNFIT = re.compile("[\0\ud800-\udfff]")
"""What no text may hold: NUL, at which C cuts texts off, and halves of characters, which no file can hold."""

T = TypeVar("T", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys, naming the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    @classmethod
    def _keys(cls) -> set[str]:
        return {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)

    @classmethod
    def misnamed(cls, data: dict[Any, Any]) -> list[str]:
        """Return what is wrong with the names in a section; told beside what is wrong with values."""
        known = cls._keys()
        unknown = islice((key for key in data if key not in known), MOST_LOOKED_AT)
        return [f'unknown key "{key}"{nearest(str(key), known)}' for key in unknown]

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_misnamed(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        problems = cls.misnamed(data) if isinstance(data, dict) else []
        if not problems:
            return handler(data)
        known = cls._keys()
        faults = [_fault(problem, data) for problem in problems]
        try:
            handler({key: value for key, value in data.items() if key in known})
        except ValidationError as problem:
            unknown = islice((key for key in data if key not in known), MOST_LOOKED_AT)
            meant = {name for key in unknown for name in closest(str(key), known)}
            for told in problem.errors(include_url=False):
                if told["type"] == "missing" and len(told["loc"]) == 1 and told["loc"][0] in meant:
                    continue  # it is there, under a name that has a fault of its own
                kept = {"type": told["type"], "loc": told["loc"], "input": told["input"]}
                faults.append(cast(InitErrorDetails, {**kept, "ctx": told.get("ctx", {})}))
        raise ValidationError.from_exception_data(cls.__name__, faults)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name:
            hint = cls.model_fields[info.field_name].annotation
            kinds = {hint, *get_args(hint)}
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _fault(message: str, data: Any) -> InitErrorDetails:
    return {"type": "value_error", "loc": (), "input": data, "ctx": {"error": ValueError(message)}}


def all_wrong(messages: Sequence[str], data: Any) -> ValidationError:
    """Return what a validator raises where several things are wrong with `data`."""
    return ValidationError.from_exception_data("section", [_fault(message, data) for message in messages])


_TAG = "tag:yaml.org,2002:"
_NUMBERS = {
    "int": re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


class _Resolver(yaml.resolver.Resolver):
    """Tells numbers as YAML 1.2 does, true, false and null as YAML 1.1 does, and texts for the rest."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        if kind is not yaml.ScalarNode or value is None or not implicit[0]:
            return tag
        if tag in (_TAG + "bool", _TAG + "null"):
            return tag
        for name, pattern in _NUMBERS.items():
            if pattern.fullmatch(value):
                return _TAG + name
        return _TAG + "str"


class _Dumper(_Resolver, yaml.SafeDumper):
    """Safe dumper that quotes what `_Loader` would take for a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Put texts with Unicode's own line breaks in double quotes, which alone keep them."""
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(_Resolver, yaml.SafeLoader):
    """Safe loader that refuses duplicate keys."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a decimal number even where it begins with 0; 0x and 0o are hexadecimal and octal."""
        text = self.construct_scalar(node)
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)

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


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str, error: type[UserError]) -> Any:
    """Return the data of a YAML text.

    Args:
        text: At most 1 MiB and 50,000 values, 64 levels deep, without aliases, tags or duplicate keys.
        where: What to call the text in messages, usually its path.
        error: The class of error to raise.
    """
    if len(text) > MAX_BYTES:
        raise error(f"{where}: too large: expected at most {MAX_BYTES} characters, got {len(text)}")
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if count > MAX_EVENTS:
                raise error(f"{where}: more values than the {MAX_EVENTS:,} that one file may have")
            if isinstance(event, yaml.ScalarEvent) and _UNFIT.search(event.value):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise error(f"{where}: line {line}: a text holds NUL or half a character (a lone surrogate)")
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise error(f"{where}: line {line}: alias *{event.anchor}: not allowed; write the value out")
            tag = getattr(event, "tag", None)
            if tag is not None:
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise error(f"{where}: line {line}: tag {tag}: not allowed; write the plain value")
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
        raise error(one_line(f"{where}: not valid YAML: {line}{detail}")) from None
    except ValueError as problem:
        raise error(one_line(f"{where}: not valid YAML: {problem}")) from None


def dump_yaml(data: Any) -> str:
    """Return plain data as a YAML text that `parse_yaml` takes back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def read_text(path: Path, error: type[UserError]) -> str:
    """Return the text of a file, or raise `error` in one line."""
    try:
        return read_bytes(path, MAX_BYTES, error).decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{path}: not a text file in UTF-8") from None


def read_yaml(path: Path, error: type[UserError]) -> Any:
    """Return the data of a YAML file; see `parse_yaml`."""
    return parse_yaml(read_text(path, error), str(path), error)


def validated(model: type[T], data: Any, where: str, error: type[UserError]) -> T:
    """Return `data` as a `model`, or raise `error` naming the key, what was expected and what was got.

    All faults that do not depend on each other are told.
    """
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        first, *others = (f"{where}: {line}" for line in explain(problem))
        raise error(first, others) from None


_KINDS = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "string_type": "a text",
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    "literal_error": "{expected}",
}
"""What was expected, by pydantic's fault, where a value is of the wrong kind."""

_LIMITS = {
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} item(s)",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a text that matches {pattern}",
}
"""What was expected, by pydantic's fault, where a value is of the right kind."""


def explain(problem: ValidationError) -> list[str]:
    """Return each fault of a validation error as one line: key, what was expected, what was got.

    Wrong names come first, since what is wrong with values may follow from them; what is missing comes last.
    """
    faults = problem.errors(include_url=False)[: 10 * MOST_LOOKED_AT]
    lines = list(dict.fromkeys(_lines([fault for fault in faults if not _follows(fault)] or faults)))
    return sorted(lines, key=lambda line: ("unknown key" not in line, line.endswith(MISSING)))


def _lines(faults: Sequence[Any], begin: int = 0) -> Iterator[str]:
    """Yield a line for each fault that was meant; `begin` says how many parts of their places are settled.

    A union reports a fault for each of its branches. The one deepest in the data is in the branch that the
    user meant, and where none is deeper, one of our own messages.
    """
    unions: dict[tuple[int | str, ...], list[Any]] = {}
    for fault in faults:
        place = fault["loc"]
        branch = next((i for i, part in enumerate(place) if i >= begin and _is_branch(part)), None)
        if branch is None:
            unions[(*place, f"[{len(unions)}]")] = [fault]
        else:
            unions.setdefault(place[:branch], []).append(fault)
    for place, told in unions.items():
        meant = max(told, key=_nearness)
        branch = meant["loc"][: len(place) + 1]
        alike = [fault for fault in told if _path(fault) == _path(meant)]
        deeper = meant["type"] == "value_error" or len(_path(meant)) > len(_path({"loc": place}))
        if len(told) > 1 and deeper:
            inside = [fault for fault in told if fault["loc"][: len(branch)] == branch]
            yield from _lines(inside, len(branch))
        else:
            yield _line(meant, alike)


def _follows(fault: Any) -> bool:
    """Whether a list is too short only because its items have faults of their own."""
    return bool(fault["type"] == "too_short" and len(fault["input"]) >= fault["ctx"]["min_length"])


def _nearness(fault: Any) -> tuple[bool, int, bool]:
    return "unknown key" in fault["msg"], len(_path(fault)), fault["type"] == "value_error"


def _line(fault: Any, alike: Sequence[Any]) -> str:
    """Return a fault as one line, with what each of those at the same place expected."""
    key = ".".join(_path(fault))
    prefix = f"{key}: " if key else ""
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if fault["type"] == "value_error":
        # Messages of our own may begin with the part of the key that lies below the validated section.
        below = re.match(r"[a-z_]+(\.[\w-]+)*: ", message)
        return one_line(f"{key}{'.' if below else ': '}{message}" if key else message)
    if fault["type"] == "missing":
        return f"{prefix}{MISSING}"
    limits = [f for f in alike if f["type"] in _LIMITS]
    known = limits or [f for f in alike if f["type"] in _KINDS]
    wanted = list(dict.fromkeys(_expected(f) for f in known))
    shown = json.dumps(fault["input"], default=str)
    got = f"got {shown if len(shown) < 80 else shown[:77] + '...'}"
    if not wanted:
        return one_line(f"{prefix}{message[:1].lower()}{message[1:]}, {got}")
    if isinstance(fault["input"], str) and _looks_numeric(fault["input"]):
        got += " (a text: write numbers without quotes)"
    if isinstance(fault["input"], bool):
        got += " (YAML reads yes, no, on and off as true and false: put texts in quotes)"
    return one_line(f"{prefix}expected {' or '.join(wanted)}, {got}")


def _expected(fault: Any) -> str:
    shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in fault.get("ctx", {}).items()}
    return {**_KINDS, **_LIMITS}[fault["type"]].format_map(shown)


def _path(fault: Any) -> list[str]:
    """Return the keys of a fault without the names of union branches among them."""
    return [str(part) for part in fault["loc"] if not _is_branch(part)]


@lru_cache(maxsize=4096)
def _is_branch(part: int | str) -> bool:
    if not isinstance(part, str):
        return False
    written = "[" in part or part.startswith("constrained-")
    return written or part in {"float", "int", "str", "bool", "tuple"} | _model_names(StrictModel)


def _model_names(model: type[BaseModel]) -> set[str]:
    return {model.__name__}.union(*(_model_names(below) for below in model.__subclasses__()))


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def canonical_json(data: Any) -> str:
    """Return the one JSON text of plain data: keys sorted, no spaces, floats by repr, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
