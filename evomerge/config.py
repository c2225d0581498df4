"""The run config: one YAML file, validated; every section belongs to the part it configures.

Also reads the configs of `mergekit-evolve` (`genome:` and `tasks:`), see `evomerge.mergekit`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evomerge.errors import ConfigError, nearest
from evomerge.fitness.settings import FitnessSettings
from evomerge.mergekit_evolve import is_evolve_config, read_evolve_config
from evomerge.optimizers import SETTINGS, settings_of
from evomerge.recipe import SourceRef
from evomerge.spaces.settings import SpaceSettings
from evomerge.strict import StrictModel, all_wrong, parse_yaml, read_yaml, validated
from evomerge.workers.settings import WorkerSettings

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

TRACKER = r"^(optuna|tensorboard|wandb|mlflow):."


def _as_source(data: Any) -> Any:
    """Accept a bare path and name it after its last part."""
    if isinstance(data, str):
        data = {"path": data}
    if isinstance(data, dict) and isinstance(data.get("path"), str) and "name" not in data:
        last = Path(data["path"].rstrip("/")).name
        data = {"name": re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:100] or "model", **data}
    return data


class SourcesSettings(StrictModel):
    """The checkpoints of a run: local directories, relative to the config, or hub ids.

    Attributes:
        base: The common ancestor, for methods that work on deltas and for the task-arithmetic baseline.
        models: What is merged.
    """

    base: SourceRef | None = None
    models: tuple[SourceRef, ...] = Field(min_length=1)

    @field_validator("base", mode="before")
    @classmethod
    def _base(cls, data: Any) -> Any:
        return _as_source(data)

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, data: Any) -> Any:
        return [_as_source(item) for item in data] if isinstance(data, list | tuple) else data

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [ref.name for ref in self.all]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'the name "{name}" is used twice; give each source its own `name`')
        return self

    @property
    def all(self) -> tuple[SourceRef, ...]:
        """The base, if any, then the models."""
        return ((self.base,) if self.base else ()) + self.models


class OptimizerSettings(BaseModel):
    """Which optimizer proposes candidates; its own settings stand beside its name.

    Attributes:
        name: `cma_es`, `niches`, `optuna` or `random`.
        start: Recipe files; scored first, and the search begins from the best of them. None: the centre
            of the space.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = "cma_es"
    start: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's own settings as they were given."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Check name and settings without loading the optimizer."""
        try:
            known = settings_of(self.name)
        except ConfigError as problem:
            raise ValueError(_below(problem)) from None
        names = [field.name for field in dataclasses.fields(known)]
        problems = [
            f'{given}: unknown setting of "{self.name}"{nearest(given, [*names, *type(self).model_fields])}'
            for given in self.settings
            if given not in names
        ]
        try:
            known(**{name: value for name, value in self.settings.items() if name in names})
        except ConfigError as problem:
            problems.append(_below(problem))
        if problems:
            raise all_wrong(problems, self.settings)
        return self


def _below(problem: ConfigError) -> str:
    """Return a message about the section `optimizer` as its validator says it."""
    return str(problem).removeprefix("optimizer.")


class BudgetSettings(StrictModel):
    """When the search ends; the baselines and the final selection come on top.

    Attributes:
        evaluations: Candidates the optimizer may propose.
        hours: Wall-clock hours after which it proposes no more; None: no limit. A resumed run starts anew.
        patience: Ends after this many candidates without a better search score; None: never.
        finalists: How many of the best candidates are scored on the select documents.
    """

    evaluations: int = Field(default=100, ge=1)
    hours: float | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, ge=1)
    finalists: int = Field(default=8, ge=1, le=100)


class OutputSettings(StrictModel):
    """Where results go.

    Attributes:
        folder: Of the report and the exported model, relative to the working directory; None: a folder named
            after the run beside its SQLite store, else below `runs`.
        export: Export the winner at the end.
        report: Write the report at the end.
    """

    folder: str | None = None
    export: bool = False
    report: bool = True


class BaselineSettings(StrictModel):
    """What the winner has to beat, besides every source and the uniform average.

    Attributes:
        task_arithmetic: Scales of plain task arithmetic to try on the search documents; the best one
            counts as the baseline. Needs a base.
    """

    task_arithmetic: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class RunConfig(StrictModel):
    """One search.

    Attributes:
        name: Of the run, unique in its store.
        seed: Of everything that is drawn at random.
        sources: The checkpoints.
        space: The recipes to search.
        optimizer: What proposes them.
        fitness: How they are scored.
        budget: When the search ends.
        baselines: What the winner has to beat.
        workers: What they run on.
        store: SQLite file, relative to the config, or `postgresql://` URL; None: the command's `--store`.
        output: Where results go.
        trackers: Where it is shown besides, each KIND:WHERE: `optuna:FILE.db`, `tensorboard:FOLDER`,
            `wandb:PROJECT`, `mlflow:FILE.db` or `mlflow:URL`; paths are relative to the config.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0, lt=2**63)
    sources: SourcesSettings
    space: SpaceSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    fitness: FitnessSettings
    budget: BudgetSettings = BudgetSettings()
    baselines: BaselineSettings = BaselineSettings()
    workers: WorkerSettings = WorkerSettings()
    store: str | None = None
    output: OutputSettings = OutputSettings()
    trackers: tuple[Annotated[str, Field(pattern=TRACKER)], ...] = ()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.space.kind == "segments" and self.optimizer.name != "niches":
            raise ValueError(
                "optimizer.name: a space of kind segments needs the optimizer niches, "
                f"got {self.optimizer.name}"
            )
        if self.fitness.resample is not None and self.optimizer.name != "cma_es":
            raise ValueError(
                f"fitness.resample: fresh documents for each generation need the optimizer cma_es, "
                f"got {self.optimizer.name}"
            )
        return self


CHANGEABLE = frozenset({"budget", "workers", "output", "store", "trackers"})
"""Sections that may differ when a run is resumed; the others decide what the run is."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config in a YAML file.

    Args:
        path: An evomerge config, or one of mergekit-evolve.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: In one line naming the file, the key, what was expected and what was got.
    """
    return parse_config(read_data(path), str(path), overrides)


def read_data(path: Path) -> dict[str, Any]:
    """Return what is in a config file as plain data with a name, one of mergekit-evolve translated.

    Raises:
        ConfigError: The file cannot be read, or is no mapping.
    """
    found = read_yaml(path, ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping with sources, space and fitness, got {_kind(found)}")
    data: dict[str, Any] = found
    if is_evolve_config(data):
        data = read_evolve_config(data, path)
    data.setdefault("name", path.stem)
    return data


def parse_config(data: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return plain data as a config, after overrides."""
    for override in overrides:
        data = overridden(data, override)
    return validated(RunConfig, data, where, ConfigError)


def overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of `data` with one `a.b=value` set; items of lists by number."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.key=value")
    value = parse_yaml(text, f"--set {key}", ConfigError)

    def put(node: Any, parts: list[str]) -> Any:
        head, rest = parts[0], parts[1:]
        if isinstance(node, list | tuple):
            items = list(node)
            if not head.isdigit() or int(head) >= len(items):
                raise ConfigError(f"--set {key}: {head} is not the number of an item (0 to {len(items) - 1})")
            items[int(head)] = put(items[int(head)], rest) if rest else value
            return items
        if node is not None and not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {head} lies below a value that is no section")
        return {**(node or {}), head: put((node or {}).get(head), rest) if rest else value}

    result: dict[str, Any] = put(data, key.split("."))
    return result


SHORT_FORMS: dict[str, dict[str, Any]] = {
    "SourceRef": {"type": "string", "description": "A local directory or hub id."},
    "TaskSettings": {"type": "string", "description": "The name of a task."},
    "Granularity": {"enum": ["model", "layer"]},
}
"""What a config may say in place of a mapping."""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the config file, for editors."""
    schema = RunConfig.model_json_schema(by_alias=True)
    models: dict[str, type[BaseModel]] = {model.__name__: model for model in _models_in(RunConfig)}
    for name, definition in [("RunConfig", schema), *schema["$defs"].items()]:
        _describe(definition, models[name])
    optimizer = schema["$defs"]["OptimizerSettings"]
    optimizer["properties"]["name"]["enum"] = list(SETTINGS)
    for settings in SETTINGS.values():
        for field in dataclasses.fields(settings):
            optimizer["properties"].setdefault(field.name, {"description": field.metadata["doc"]})
    # A source is named after the last part of its path where it has no name, a config after its file.
    schema["$defs"]["SourceRef"]["required"].remove("name")
    schema["required"].remove("name")
    for name, short in SHORT_FORMS.items():
        schema["$defs"][name] = {"anyOf": [short, schema["$defs"][name]]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "evomerge run config",
    }


def _models_in(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a model and those of its fields, at any depth."""
    found: set[type[BaseModel]] = set()
    left: list[Any] = [model]
    while left:
        hint = left.pop()
        left += get_args(hint)
        if isinstance(hint, type) and issubclass(hint, BaseModel) and hint not in found:
            found.add(hint)
            left += [field.annotation for field in hint.model_fields.values()]
    return found


def _describe(definition: dict[str, Any], model: type[BaseModel]) -> None:
    """Describe a model by its docstring's first paragraph, its fields by `Attributes:` of all its classes."""
    for kind in reversed([kind for kind in model.__mro__ if issubclass(kind, BaseModel)]):
        summary, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:")
        definition["description"] = " ".join(summary.split())
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE):
            if name in definition["properties"]:
                definition["properties"][name]["description"] = " ".join(text.split())


def _kind(data: Any) -> Literal["nothing", "a list", "a text", "a value"]:
    if data is None:
        return "nothing"
    if isinstance(data, list):
        return "a list"
    return "a text" if isinstance(data, str) else "a value"
